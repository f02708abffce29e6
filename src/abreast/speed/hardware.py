"""The hardware that `estimate` knows: frozen rows per device and link, read from hardware.yaml."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from abreast.errors import AbreastError

_TABLE = Path(__file__).with_name("hardware.yaml")


class HardwareError(AbreastError):
    """Hardware that is not in the table, or cannot run what is asked."""


@dataclass(frozen=True)
class Hardware:
    """`count` equal devices. bandwidth: bytes/s of memory; flops: FLOP/s per dtype, as pairs;
    memory: bytes; link_bandwidth: bytes/s per device and direction, 0 for one device alone;
    latency and latency_per_doubling: seconds of an all-reduce (see hardware.yaml)."""

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

    def peak(self, dtype: str) -> float:
        return dict(self.flops)["bfloat16" if dtype == "float16" else dtype]

    def all_reduce(self, nbytes: float, ranks: int) -> float:
        """Seconds to add up `nbytes` over `ranks` devices, by latency and ring volume."""
        if ranks < 2:
            return 0.0
        volume = 2 * (ranks - 1) / ranks * nbytes / self.link_bandwidth
        return self.latency + self.latency_per_doubling * math.log2(ranks) + volume


@functools.cache
def table() -> dict[str, Any]:
    """hardware.yaml."""
    found: dict[str, Any] = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return found


def known_hardware() -> str:
    names = []
    for name, device in table()["devices"].items():
        names.append(f"{name} ({', '.join(device['links'])})")
    return ", ".join(names)


def hardware_of(text: str) -> Hardware:
    """Read "A100", "2xA100-NVLink", "8xH100-PCIe". Without a link: the first of the device's.

    Raises HardwareError that lists what is known.
    """
    match = re.fullmatch(r"(?:(\d{1,4})x)?(.+)", text.strip())
    devices = table()["devices"]
    count, rest = (int(match[1] or 1), match[2]) if match else (0, "")
    names = {name.lower(): name for name in devices}
    name, link = names.get(rest.lower()), None
    if name is None and "-" in rest:
        head, _, tail = rest.rpartition("-")
        name = names.get(head.lower())
        links = {entry.lower(): entry for entry in devices[name]["links"]} if name else {}
        link = links.get(tail.lower())
        name = name if link else None
    if name is None or not 1 <= count <= 1024:
        raise HardwareError(
            f"unknown hardware '{text}'; known are {known_hardware()}; several: 2xA100-NVLink"
        )
    device = devices[name]
    link = link or next(iter(device["links"]))
    about = table()["links"][link]
    return Hardware(
        name=text,
        count=count,
        bandwidth=float(device["bandwidth"]),
        flops=tuple((dtype, float(peak)) for dtype, peak in device["flops"].items()),
        memory=float(device["memory"]),
        synchronous=bool(device.get("synchronous", False)),
        link=link if count > 1 else None,
        link_bandwidth=float(device["links"][link]),
        latency=float(about["latency"]),
        latency_per_doubling=float(about["latency_per_doubling"]),
    )
