"""From `git clone` to the demo's table, as a newcomer: clone, `make demo`. Target: under 5 minutes.

The clone goes to an empty folder; nothing of this checkout's environment is used. Packages come
from pip, so a warm package cache is assumed, and the time says nothing about the network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    here = Path(__file__).resolve().parents[1]
    clean = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(["git", "clone", "-q", str(here), f"{folder}/abreast"], check=True)
        done = subprocess.run(
            ["make", "demo"], cwd=f"{folder}/abreast", env=clean, capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
    print(done.stdout[-3000:] if done.returncode == 0 else done.stderr[-3000:], file=sys.stderr)
    print(json.dumps({"benchmark": "clone_to_table", "seconds": round(seconds, 1)}))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
