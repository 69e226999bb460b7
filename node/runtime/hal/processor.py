"""The processor as a device: what this process may use of it, and what its sensors say (`psutil`)."""

from __future__ import annotations

import hashlib
import os
import platform
import time
import uuid
from pathlib import Path
from typing import Final

import psutil

from node.runtime.hal.devices import Device, Kind
from node.runtime.hal.readings import Asking, Reading

FLAGS: Final = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)
"""Of all that a processor has, what decides which number formats are fast."""
_UNASKED: Final = {
    "power_watts": "only the superuser may read a processor's energy counters",
    "power_limit_watts": "only the superuser may read a processor's power limits",
    "ecc_corrected": "the system's business, not a process's",
    "ecc_uncorrected": "the system's business, not a process's",
    "processes": "every process computes on it",
    "driver": "it needs none",
    "pcie_generation": "it is on no such bus",
    "pcie_width": "it is on no such bus",
}
_SENSORS: Final = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "acpitz")


def processor(capability: str = "") -> Device:
    """`capability`: the instruction set that torch uses."""
    name, flags = _cpuinfo()
    total, free = memory()
    return Device(
        kind=Kind.CPU,
        index=0,
        name=name,
        uuid=_identity(name),
        memory_total=total,
        memory_free=free,
        capability=capability,
        flags=flags,
        runtime=platform.machine(),
    )


def memory() -> tuple[int, int]:
    """Total and free bytes: the machine's, or what a control group leaves of them."""
    seen = psutil.virtual_memory()
    limit, used = _cgroup()
    if limit is None or limit >= seen.total:
        return int(seen.total), int(seen.available)
    return limit, max(0, min(int(seen.available), limit - used))


def read(seconds: float = 0.1) -> Reading:
    """The whole processor, watched for so long."""
    before = Load()
    time.sleep(seconds)
    used = before.shares()[0]
    asking = Asking((OSError, AttributeError, NotImplementedError, RuntimeError))
    asking.ask("temperature_c", _temperature)
    asking.ask("utilisation", lambda: used)
    asking.ask("memory_used", lambda: memory()[0] - memory()[1])
    asking.ask("memory_total", lambda: memory()[0])
    asking.missing |= _UNASKED
    asking.ask("clock_mhz", lambda: float(frequency.current) if (frequency := psutil.cpu_freq()) else None)
    return asking.reading()


class Load:
    """How much of all processors was used since this was made, and how much of that by others than this process.

    Time that a hypervisor took away (steal) is used by others.
    """

    def __init__(self) -> None:
        self._began = _times()

    def shares(self) -> tuple[float, float]:
        """(all, others), each 0 to 1."""
        whole, idle, ours = (now - then for now, then in zip(_times(), self._began, strict=True))
        if whole <= 0:
            return 0.0, 0.0
        busy = max(0.0, whole - idle)
        return min(1.0, busy / whole), min(1.0, max(0.0, busy - ours) / whole)


def _times() -> tuple[float, float, float]:
    """Seconds of all processors together: in all, idle, ours (with children that have ended)."""
    every = psutil.cpu_times()
    idle = every.idle + getattr(every, "iowait", 0.0)
    # guest time is counted in user time already
    whole = sum(every) - getattr(every, "guest", 0.0) - getattr(every, "guest_nice", 0.0)
    return whole, idle, sum(os.times()[:4])


def _temperature() -> float | None:
    sensors = psutil.sensors_temperatures()
    for name in _SENSORS:
        if sensors.get(name):
            return float(max(one.current for one in sensors[name]))
    return None


def flags() -> tuple[str, ...]:
    """Those of `FLAGS` that this machine's processor has."""
    return _cpuinfo()[1]


def _cpuinfo() -> tuple[str, tuple[str, ...]]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), ()
    values: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        values.setdefault(key.strip().lower(), value.strip())
    name = values.get("model name") or values.get("cpu model") or platform.processor() or platform.machine()
    has = set((values.get("flags") or values.get("features") or "").split())
    return name[:128], tuple(flag for flag in FLAGS if flag in has)


def _identity(name: str) -> str:
    """The machine's own number is to stay on the machine (man 5 machine-id), so what is told is a hash of it."""
    try:
        machine = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        machine = ""
    text = f"gristmill device\n{machine or uuid.getnode()}\n{name}"
    return "CPU-" + hashlib.sha256(text.encode()).hexdigest()[:32]


def _cgroup() -> tuple[int | None, int]:
    """Limit and use of the control group (version 2) that this process is in; no limit where there is none."""
    try:
        line = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()[-1]
        folder = Path("/sys/fs/cgroup") / line.partition("::")[2].lstrip("/")
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = (folder / "memory.current").read_text(encoding="ascii").strip()
    except (OSError, IndexError, UnicodeDecodeError):
        return None, 0
    return (int(limit), int(used)) if limit.isdigit() and used.isdigit() else (None, 0)
