"""Look for devices: torch says which there are, the vendors' libraries add what torch does not know.

torch is asked in a child, since a node that computes nothing itself needs none of it: 140 MB of memory, and the handle of a GPU.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec

import node
from node.errors import DeviceNotFound
from node.hardening import environment
from node.runtime.hal import amd, nvidia, processor
from node.runtime.hal.by_torch import look
from node.runtime.hal.devices import AUTO, SEEN, Choice, Device, Found, Kind, choose
from node.runtime.hal.readings import Reading, Unavailable
from protocol.tame import one_line

CHILD_SECONDS: Final = 120.0
"""A cold disk and a busy machine take their time over torch."""
ANSWER_LIMIT: Final = 1 << 20


def find(torch: Any = None) -> Found:
    """Every device that torch can compute on, best kind first. torch is loaded in a process that ends with its answer, once in
    the life of ours; what the processor has free is looked up each time. `torch`: asked here, instead.

    Raises `DeviceNotFound` when torch cannot be loaded."""
    if torch is not None:
        return look(torch)
    seen = _seen()
    total, free = processor.memory()
    devices = (
        replace(one, memory_total=total, memory_free=free) if one.kind is Kind.CPU else one for one in seen.devices
    )
    return Found(tuple(devices), seen.absent)


def look_ahead() -> None:
    """Begin to look in a thread, so that who asks soon need not wait as long: torch takes seconds to load."""

    def run() -> None:
        with suppress(DeviceNotFound):  # who asks for devices hears it
            _seen()

    threading.Thread(target=run, name="look for devices", daemon=True).start()


_LOOKING: Final = threading.Lock()


def _seen() -> Found:
    with _LOOKING:  # who comes while another looks has the same answer
        return _asked()


@cache
def _asked() -> Found:
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "node.runtime.hal.probe_child"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CHILD_SECONDS,
            check=False,
            cwd="/",
            env=environment(
                SEEN, PYTHONPATH=str(Path(node.__file__).resolve().parents[1]), OMP_WAIT_POLICY="PASSIVE", HOME="/tmp"
            ),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceNotFound(f"torch could not be asked for devices: {error}"[:300]) from None
    lines = done.stdout[-ANSWER_LIMIT:].splitlines()
    try:
        return msgspec.json.decode(lines[-1] if lines else b"", type=Found)
    except msgspec.DecodeError:
        said = one_line(done.stderr.decode(errors="replace"))[-300:] or f"its process ended with {done.returncode}"
        raise DeviceNotFound(f"torch could not be asked for devices: {said}", hint="gristmill doctor") from None


def chosen(wanted: str = AUTO, torch: Any = None) -> Choice:
    """`devices.choose` among what there is. Raises `DeviceNotFound`."""
    return choose(wanted, find(torch))


def read(device: Device) -> Reading | Unavailable:
    """The device's sensors now. Takes up to a second where a library needs a process of its own."""
    match device.kind:
        case Kind.CUDA:
            return nvidia.read(device.uuid)
        case Kind.ROCM:
            return amd.read(device.bus)
        case Kind.CPU:
            return processor.read()
        case Kind.XPU:
            return Unavailable("no library of Intel's is used; xpu-smi shows what there is")
        case Kind.MPS:
            return Unavailable("Apple's sensors are for the superuser (powermetrics)")


def with_vendor(device: Device, reading: Reading | Unavailable) -> Device:
    """The device with what its vendor's library knows better."""
    if isinstance(reading, Unavailable):
        return device
    return replace(
        device,
        driver=reading.driver or device.driver,
        pcie_generation=reading.pcie_generation,
        pcie_width=reading.pcie_width,
        power_limit_watts=reading.power_limit_watts,
    )
