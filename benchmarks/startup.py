"""How long `abreast --help` takes, from process start to exit. Target: under 0.3 s."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 20


def main() -> None:
    command = [str(Path(sys.executable).with_name("abreast")), "--help"]
    seconds = []
    for turn in range(ROUNDS + 2):  # two rounds to warm the file cache
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        if turn >= 2:
            seconds.append(time.perf_counter() - start)
    result = {
        "benchmark": "startup",
        "median_s": round(statistics.median(seconds), 3),
        "min_s": round(min(seconds), 3),
        "max_s": round(max(seconds), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
