"""What a device is, and which one is used: `choose` picks by a fixed order and says why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from node.errors import DeviceNotFound


class Kind(StrEnum):
    """In the order of preference: the first that is there is used when nothing is set."""

    CUDA = "cuda"
    ROCM = "rocm"
    XPU = "xpu"
    MPS = "mps"
    CPU = "cpu"


AUTO: Final = "auto"
SEEN: Final = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "LD_LIBRARY_PATH")
"""Of our environment, what a process that computes needs: which devices are its own, and where their drivers are."""
_TORCH_NAMES: Final = MappingProxyType({Kind.ROCM: "cuda"})
"""torch calls AMD's devices cuda."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device that torch can compute on."""

    kind: Kind
    index: int
    name: str
    uuid: str
    """As the vendor gives it; of the processor a hash of machine and model. Empty when there is none."""
    memory_total: int
    """Bytes; of the processor what this process may use."""
    memory_free: int
    """Bytes, when it was looked at."""
    driver: str = ""
    runtime: str = ""
    """Version of CUDA, ROCm or Level Zero that torch was built for."""
    capability: str = ""
    """Compute capability ("9.0"), architecture ("gfx942"), or the processor's instruction set as torch uses it ("AVX512")."""
    flags: tuple[str, ...] = ()
    """What it has that decides which number formats are fast."""
    bus: str = ""
    """PCI address, e.g. 0000:17:00.0."""
    pcie_generation: int | None = None
    pcie_width: int | None = None
    power_limit_watts: float | None = None

    @property
    def torch_name(self) -> str:
        """What `torch.device` takes."""
        name = _TORCH_NAMES.get(self.kind, self.kind.value)
        return name if self.kind in (Kind.CPU, Kind.MPS) else f"{name}:{self.index}"

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.kind.value}:{self.index} {self.name}" if self.kind is not Kind.CPU else f"cpu {self.name}"


@dataclass(frozen=True, slots=True)
class Found:
    """What there is, best first, and why the rest is not."""

    devices: tuple[Device, ...]
    absent: Mapping[Kind, str] = field(default_factory=dict)
    """By kind that has no device: why."""


@dataclass(frozen=True, slots=True)
class Choice:
    device: Device
    why: str


def choose(wanted: str, found: Found) -> Choice:
    """`wanted`: `auto`, or a kind with or without an index, e.g. `cuda:1`. Raises `DeviceNotFound`.

    Among several devices of the best kind `auto` takes the one with the most free memory, then the lowest index.
    """
    if wanted == AUTO:
        best = found.devices[0].kind
        same = [one for one in found.devices if one.kind is best]
        device = min(same, key=lambda one: (-one.memory_free, one.index))
        missing = [f"{kind.value}: {found.absent[kind]}" for kind in Kind if kind in found.absent]
        why = f"engine.device is auto; the best of {len(found.devices)}"
        if len(same) > 1:
            why += f", of {len(same)} of its kind the one with the most free memory"
        return Choice(device, why + ("" if not missing else f" ({'; '.join(missing)})"))
    name, _, index = wanted.partition(":")
    kind = Kind(name)
    if kind is Kind.CUDA and kind in found.absent and Kind.ROCM not in found.absent:
        kind = Kind.ROCM  # torch's own word for it
    device_or_none = next((d for d in found.devices if d.kind is kind and d.index == int(index or 0)), None)
    if device_or_none is None:
        why = found.absent.get(kind) or f"there are {sum(d.kind is kind for d in found.devices)} devices of this kind"
        raise DeviceNotFound(
            f"engine.device is {wanted}, which is not there: {why}",
            hint="set engine.device to auto, or to one of " + ", ".join(_settings(found)),
        )
    return Choice(device_or_none, f"engine.device is {wanted}")


def _settings(found: Found) -> list[str]:
    return ["cpu" if d.kind is Kind.CPU else f"{d.kind.value}:{d.index}" for d in found.devices]
