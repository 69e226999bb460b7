"""Simulated hardware: a torch that sees devices which are not there, and NVIDIA's management library for them. Product code.

Every name says that it is simulated. Nothing here computes; it answers the questions that `node.runtime.hal` asks, in the form
of the real libraries (torch 2.13, nvidia-ml-py 13; `node.testing.simulated_amdsmi` is AMD's). Where a real one raises, this does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class SimulatedGpu:
    """What torch and NVML say of one NVIDIA card."""

    uuid: str = "GPU-00000000-5150-4c41-5445-000000000001"
    name: str = "Simulated GPU"
    major: int = 9
    minor: int = 0
    total: int = 80 * GIB
    used: int = 1 * GIB
    bus: int = 0x17
    temperature: int = 41
    utilisation: int = 0
    """Percent."""
    milliwatts: int = 71_500
    limit_milliwatts: int = 700_000
    throttle: int = 0x1
    """Bits; idle."""
    ecc: bool = True
    """A card of a gamer has none, and NVML raises."""
    processes: tuple[tuple[int, int | None], ...] = ()
    pcie: tuple[int, int] = (5, 16)


def simulated_torch(
    *,
    nvidia: Sequence[SimulatedGpu] = (),
    amd: Sequence[SimulatedGpu] = (),
    intel: Sequence[SimulatedGpu] = (),
    apple: int = 0,
    broken: str = "",
) -> Any:
    """A module-like object with the part of torch that tells of devices. `apple`: bytes of a Metal device. `broken`: what the
    driver raises when it is asked for memory."""
    if nvidia and amd:
        raise ValueError("one torch is built for one of them")
    cards = list(nvidia or amd)

    def memory(index: int) -> tuple[int, int]:
        if broken:
            raise RuntimeError(broken)
        return cards[index].total - cards[index].used, cards[index].total

    cuda = SimpleNamespace(
        is_available=lambda: bool(cards),
        device_count=lambda: len(cards),
        get_device_properties=lambda index: _properties(cards[index], amd=bool(amd)),
        mem_get_info=memory,
    )
    xpu = SimpleNamespace(
        is_available=lambda: bool(intel),
        device_count=lambda: len(intel),
        get_device_properties=lambda index: SimpleNamespace(
            name=intel[index].name,
            uuid=intel[index].uuid,
            driver_version="1.6.33578+simulated",
            platform_name="Intel(R) oneAPI Unified Runtime over Level-Zero",
            architecture=13136561920,
            has_fp16=True,
            has_fp64=False,
            has_atomic64=True,
        ),
        mem_get_info=lambda index: (intel[index].total - intel[index].used, intel[index].total),
    )
    return SimpleNamespace(
        version=SimpleNamespace(cuda="13.0" if nvidia else None, hip="7.0.2" if amd else None),
        cuda=cuda,
        xpu=xpu,
        mps=SimpleNamespace(recommended_max_memory=lambda: apple, driver_allocated_memory=lambda: 0),
        backends=SimpleNamespace(
            mps=SimpleNamespace(is_available=lambda: bool(apple)),
            cpu=SimpleNamespace(get_cpu_capability=lambda: "SIMULATED"),
        ),
    )


def _properties(card: SimulatedGpu, *, amd: bool) -> Any:
    more = {"gcnArchName": "gfx942:sramecc+:xnack-"} if amd else {}
    return SimpleNamespace(
        name=card.name,
        uuid=card.uuid.removeprefix("GPU-"),
        major=card.major,
        minor=card.minor,
        pci_domain_id=0,
        pci_bus_id=card.bus,
        pci_device_id=0,
        **more,
    )


class NVMLError(Exception):
    """As `pynvml.NVMLError`."""


@dataclass
class SimulatedNvml:
    """As the module `pynvml`: the same functions, constants and errors."""

    cards: Sequence[SimulatedGpu] = ()
    missing: bool = False
    """The library is not on the machine: `nvmlInit` raises."""
    opened: int = field(default=0, init=False)

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1
    NVML_MEMORY_ERROR_TYPE_CORRECTED = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0

    def nvmlInit(self) -> None:
        if self.missing:
            raise NVMLError("NVML Shared Library Not Found")
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> SimulatedGpu:
        for card in self.cards:
            if card.uuid == uuid:
                return card
        raise NVMLError("Not Found")

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06-simulated"

    def nvmlDeviceGetTemperature(self, card: SimulatedGpu, sensor: int) -> int:
        return card.temperature

    def nvmlDeviceGetUtilizationRates(self, card: SimulatedGpu) -> Any:
        return SimpleNamespace(gpu=card.utilisation, memory=0)

    def nvmlDeviceGetMemoryInfo(self, card: SimulatedGpu) -> Any:
        return SimpleNamespace(total=card.total, used=card.used, free=card.total - card.used)

    def nvmlDeviceGetPowerUsage(self, card: SimulatedGpu) -> int:
        return card.milliwatts

    def nvmlDeviceGetEnforcedPowerLimit(self, card: SimulatedGpu) -> int:
        return card.limit_milliwatts

    def nvmlDeviceGetClockInfo(self, card: SimulatedGpu, kind: int) -> int:
        return 1980

    def nvmlDeviceGetTotalEccErrors(self, card: SimulatedGpu, kind: int, counter: int) -> int:
        if not card.ecc:
            raise NVMLError("Not Supported")
        return 0

    def nvmlDeviceGetCurrentClocksEventReasons(self, card: SimulatedGpu) -> int:
        return card.throttle

    def nvmlDeviceGetComputeRunningProcesses(self, card: SimulatedGpu) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=memory) for pid, memory in card.processes]

    def nvmlDeviceGetCurrPcieLinkGeneration(self, card: SimulatedGpu) -> int:
        return card.pcie[0]

    def nvmlDeviceGetCurrPcieLinkWidth(self, card: SimulatedGpu) -> int:
        return card.pcie[1]
