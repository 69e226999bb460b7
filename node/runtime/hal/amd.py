"""AMD's management library through `amdsmi`, extra `amd`, asked in a child process.

`amdsmi` prints when it is imported, raises there when its library is not on the machine, and its library may end the process:
none of this may happen to a worker. The child (`amd_child`) answers one line of JSON, which is bounded, typed and then believed
as far as a sensor is.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Final

import msgspec

import node
from node.runtime.hal.readings import Process, Reading, Unavailable

CHILD_SECONDS: Final = 20.0
ANSWER_LIMIT: Final = 1 << 20
_NO_ANSWER: Final = "the device does not tell"
_Number = Annotated[float, msgspec.Meta(ge=-1e6, le=1e18)]
_Text = Annotated[str, msgspec.Meta(max_length=256)]


class AmdDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the child says of one device. Bytes, watts, degrees Celsius, MHz."""

    bus: _Text
    uuid: _Text = ""
    driver: _Text = ""
    temperature_c: _Number | None = None
    utilisation: _Number | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    power_watts: _Number | None = None
    power_limit_watts: _Number | None = None
    clock_mhz: _Number | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    throttle: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=16)] = ()
    processes: Annotated[tuple[tuple[int, int | None], ...], msgspec.Meta(max_length=1024)] | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None


class AmdAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    devices: Annotated[tuple[AmdDevice, ...], msgspec.Meta(max_length=64)] = ()
    error: Annotated[str, msgspec.Meta(max_length=1000)] = ""


def read(bus: str, module: str = "amdsmi") -> Reading | Unavailable:
    """What the library says of the device at this PCI address. `module`: what the child imports instead of `amdsmi`."""
    answer = ask(module)
    if isinstance(answer, Unavailable):
        return answer
    found = next((one for one in answer if one.bus.lower() == bus.lower()), None)
    return Unavailable(f"amdsmi knows no device at {bus}") if found is None else _reading(found)


def ask(module: str = "amdsmi") -> tuple[AmdDevice, ...] | Unavailable:
    """All devices that the library knows."""
    root = str(Path(node.__file__).resolve().parents[1])
    command = [sys.executable, "-P", "-c", _START, root, module]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHILD_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Unavailable(f"amdsmi: {error}")
    lines = done.stdout[:ANSWER_LIMIT].splitlines()
    if not lines:
        return Unavailable(f"amdsmi: its process ended with status {done.returncode} and said nothing")
    try:
        answer = msgspec.json.decode(lines[-1], type=AmdAnswer)
    except msgspec.DecodeError as error:
        return Unavailable(f"amdsmi: no answer that can be read ({error})")
    return Unavailable(f"amdsmi: {answer.error}") if answer.error else answer.devices


_START: Final = (
    "import sys; sys.path.insert(0, sys.argv[1]); from node.runtime.hal.amd_child import main; main(sys.argv[2])"
)


def _reading(one: AmdDevice) -> Reading:
    values = {name: getattr(one, name) for name in _PLAIN}
    missing = {name: _NO_ANSWER for name, value in values.items() if value is None}
    if one.processes is None:
        missing["processes"] = _NO_ANSWER
    processes = None if one.processes is None else tuple(Process(pid, memory) for pid, memory in one.processes)
    return Reading(**values, throttle=one.throttle, processes=processes, driver=one.driver or None, missing=missing)


_PLAIN: Final = (
    "temperature_c",
    "utilisation",
    "memory_used",
    "memory_total",
    "power_watts",
    "power_limit_watts",
    "clock_mhz",
    "ecc_corrected",
    "ecc_uncorrected",
    "pcie_generation",
    "pcie_width",
)
