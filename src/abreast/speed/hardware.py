"""Devices and the links between them, by name: what hardware.yaml knows, and a device's figures.

Pure, and needs no torch.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from abreast.errors import AbreastError


class HardwareError(AbreastError):
    """Hardware that is not in the table, or that cannot run the plan."""


@dataclass(frozen=True)
class Hardware:
    """`count` equal devices. bandwidth: bytes/s of memory; flops: FLOP/s per dtype, as pairs;
    memory: bytes; link_bandwidth: bytes/s per device and direction, 0 for a single device;
    latency and latency_per_doubling: seconds of an all-reduce (see hardware.yaml). one_shot: every
    device reads the others' sums whole, in one step, instead of passing parts around."""

    name: str
    count: int
    bandwidth: float
    flops: tuple[tuple[str, float], ...]
    memory: float
    synchronous: bool
    link: str | None
    link_bandwidth: float
    latency: float
    latency_per_doubling: float
    one_shot: bool = False

    def peak(self, dtype: str) -> float:
        return dict(self.flops)["bfloat16" if dtype == "float16" else dtype]

    def all_reduce(self, nbytes: float, ranks: int) -> float:
        """Seconds to add up `nbytes` over `ranks` devices, by latency and volume."""
        if ranks < 2:
            return 0.0
        parts = (ranks - 1) * (1 if self.one_shot else 2 / ranks)
        volume = parts * nbytes / self.link_bandwidth
        return self.latency + self.latency_per_doubling * math.log2(ranks) + volume

    def joined(self, ranks: int | None = None, link: float | None = None) -> Hardware:
        """The same with this many devices and microseconds per all-reduce. Raises HardwareError."""
        count = self.count if ranks is None else ranks
        if count < 1 or (link is not None and (count < 2 or not 0 <= link < math.inf)):
            raise HardwareError(
                f"--ranks {count} with --link {link} makes no sense; give 2 devices or more, and "
                "the microseconds of an all-reduce between them"
            )
        name = f"{count}x" * (count > 1) + self.name.removeprefix(f"{self.count}x")
        several = replace(self, name=name, count=count)
        if link is None:
            return several
        name += f", link of {link:g} us"
        return replace(several, name=name, latency=link * 1e-6, latency_per_doubling=0.0)


@functools.cache
def table() -> dict[str, Any]:
    """The contents of hardware.yaml."""
    text = Path(__file__).with_name("hardware.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def hardware_of(text: str) -> Hardware:
    """Read "A100", "2xA100-NVLink", "8xH100-PCIe"; without a link, the device's first one.

    Raises HardwareError that lists the known hardware.
    """
    devices = table()["devices"]
    spellings = {
        f"{name}-{link}".lower(): (name, link)
        for name in devices
        for link in devices[name]["links"]
    }
    # Last, because the A100-PCIe is a device of its own, not an A100 with a PCIe link.
    spellings |= {name.lower(): (name, next(iter(devices[name]["links"]))) for name in devices}
    match = re.fullmatch(r"(?:(\d{1,4})x)?(.+)", text.strip())
    count = int(match[1] or 1) if match else 0
    if match is None or match[2].lower() not in spellings or not 1 <= count <= 1024:
        known = ", ".join(f"{name} ({', '.join(row['links'])})" for name, row in devices.items())
        near = [one for one in spellings if match and match[2].lower() in one]
        meant = f"did you mean {' or '.join(near)}? " * bool(near)
        raise HardwareError(f"unknown hardware '{text}'; {meant}known are {known}")
    name, link = spellings[match[2].lower()]
    device, latency = devices[name], table()["links"][link]
    return Hardware(
        name=text,
        count=count,
        bandwidth=float(device["bandwidth"]),
        flops=tuple((dtype, float(peak)) for dtype, peak in device["flops"].items()),
        memory=float(device["memory"]),
        synchronous=bool(device.get("synchronous", False)),
        link=link if count > 1 else None,
        link_bandwidth=float(device["links"][link]),
        latency=float(latency["latency"]),
        latency_per_doubling=float(latency["latency_per_doubling"]),
        one_shot=bool(latency.get("one_shot", False)),
    )
