"""What a device's sensors say at one moment. Every value may be missing, and then it says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Unavailable:
    """No answer, and why there is none."""

    why: str

    def __str__(self) -> str:
        return f"not available: {self.why}"


@dataclass(frozen=True, slots=True)
class Process:
    """A program that computes on the device."""

    pid: int
    memory: int | None
    """Bytes of device memory; None where the system does not tell (containers, MIG)."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Values at one moment; None for what was not to be had."""

    temperature_c: float | None = None
    utilisation: float | None = None
    """Share of the last moment in which the device computed, 0 to 1."""
    memory_used: int | None = None
    memory_total: int | None = None
    """Bytes."""
    power_watts: float | None = None
    power_limit_watts: float | None = None
    clock_mhz: float | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    """Memory errors since the driver was loaded."""
    throttle: tuple[str, ...] = ()
    """Why its clock is held down now; the words are the vendor's."""
    processes: tuple[Process, ...] | None = None
    driver: str | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    """By field that is None: why."""


class Asking:
    """Collects values, each of which may fail for itself."""

    def __init__(self, errors: tuple[type[Exception], ...]) -> None:
        self.values: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        self._errors = errors

    def ask(self, name: str, question: Callable[[], Any]) -> None:
        """The answer under that name; None, or one of the errors, is a missing one."""
        try:
            value = question()
        except self._errors as error:
            self.missing[name] = str(error)[:200] or type(error).__name__
            return
        if value is None:
            self.missing[name] = "the device does not tell"
        else:
            self.values[name] = value

    def reading(self) -> Reading:
        return Reading(**self.values, missing=self.missing)
