"""On what a run was made, and by which command."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from abreast.checkpoint import write
from abreast.version import __version__

FILE = "environment.json"


def record_environment(out: str | Path, device: str, command: Sequence[str] | None = None) -> None:
    """Write out/environment.json: versions, machine, date, the command, and where it was given.

    command: the words of the command line, None where a program called. The folder must exist.
    """
    write(Path(out) / FILE, json.dumps(environment(device, command), indent=1) + "\n")


def environment(device: str, command: Sequence[str] | None = None) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "abreast": __version__}
    for package in ("torch", "transformers", "safetensors", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command) if command is not None else None,
        "folder": os.getcwd(),
        "device": device,
        "hardware": {"cores": os.cpu_count(), **hardware(device)},
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "versions": versions,
    }


def hardware(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found["cpu"] = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    if device.startswith("cuda") and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found
