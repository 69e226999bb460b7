"""NVIDIA's management library (NVML) through `nvidia-ml-py`, extra `nvidia`. Source: NVML API reference.

Every question is one that any user may ask. Devices are found by UUID, because `CUDA_VISIBLE_DEVICES` renumbers what torch sees.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final

from node.runtime.hal.readings import Asking, Process, Reading, Unavailable

THROTTLE: Final = MappingProxyType(
    {
        0x2: "application clocks",
        0x4: "software power cap",
        0x8: "hardware slowdown",
        0x10: "sync boost",
        0x20: "software thermal slowdown",
        0x40: "hardware thermal slowdown",
        0x80: "hardware power brake",
        0x100: "display clocks",
    }
)
"""Bits of `nvmlClocksEventReasons`; 0x1 is an idle device, which is no reason to worry."""
_UNKNOWN_MEMORY: Final = 2**64 - 1
"""NVML's value for memory that it may not tell."""


@contextmanager
def opened(module: Any = None) -> Iterator[Any]:
    """NVML, open for the length of the block; `Unavailable` when it is not there. `module`: instead of `pynvml`."""
    try:
        nvml = importlib.import_module("pynvml") if module is None else module
    except ImportError:
        yield Unavailable("the package nvidia-ml-py is not installed (pip install 'gristmill[nvidia]')")
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        yield Unavailable(f"NVML: {error}")
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def read(uuid: str, module: Any = None) -> Reading | Unavailable:
    """What NVML says of the device with this UUID."""
    with opened(module) as nvml:
        if isinstance(nvml, Unavailable):
            return nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError as error:
            return Unavailable(f"NVML knows no device {uuid}: {error}")
        return _read(nvml, handle)


def _read(nvml: Any, handle: Any) -> Reading:
    asking = Asking((nvml.NVMLError,))
    asking.ask("temperature_c", lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)))
    asking.ask("utilisation", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
    asking.ask("memory_used", lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).used))
    asking.ask("memory_total", lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).total))
    asking.ask("power_watts", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
    asking.ask("power_limit_watts", lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000)
    asking.ask("clock_mhz", lambda: float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)))
    for name, kind in (
        ("ecc_corrected", nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
        ("ecc_uncorrected", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
    ):
        asking.ask(name, lambda kind=kind: int(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, nvml.NVML_VOLATILE_ECC)))
    asking.ask("throttle", lambda: _throttle(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)))
    asking.ask("processes", lambda: _processes(nvml.nvmlDeviceGetComputeRunningProcesses(handle)))
    asking.ask("driver", lambda: str(nvml.nvmlSystemGetDriverVersion()))
    asking.ask("pcie_generation", lambda: int(nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)))
    asking.ask("pcie_width", lambda: int(nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)))
    return asking.reading()


def _throttle(bits: int) -> tuple[str, ...]:
    return tuple(words for bit, words in THROTTLE.items() if bits & bit)


def _processes(found: Any) -> tuple[Process, ...]:
    return tuple(
        Process(int(one.pid), None if one.usedGpuMemory in (None, _UNKNOWN_MEMORY) else int(one.usedGpuMemory))
        for one in found
    )
