"""Which devices torch can compute on. This module is handed torch; it runs where that is loaded (`node.runtime.hal.probe`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from node.runtime.hal import processor
from node.runtime.hal.devices import Device, Found, Kind


def look(torch: Any) -> Found:
    """Every device, best kind first, and why a kind has none."""
    devices: list[Device] = []
    absent: dict[Kind, str] = {}
    for kind, look_for in _PROBES.items():
        try:
            found = look_for(torch)
        except (
            RuntimeError,
            AssertionError,
            OSError,
        ) as error:  # a driver that is too old, a device that fell off the bus
            found = f"torch cannot use it: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}"
        if isinstance(found, str):
            absent[kind] = found
        else:
            devices += found
    return Found(tuple(devices), absent)


def _cuda(torch: Any) -> list[Device] | str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no NVIDIA device, or no driver that this torch can use"
    return [_nvidia_device(torch, index) for index in range(torch.cuda.device_count())]


def _nvidia_device(torch: Any, index: int) -> Device:
    device, properties = _device(torch.cuda, index, Kind.CUDA, f"CUDA {torch.version.cuda}")
    uuid, version = device.uuid, (int(properties.major), int(properties.minor))
    since = (("fp16", (7, 0)), ("int8", (7, 5)), ("bf16", (8, 0)), ("fp8", (8, 9)))
    return replace(
        device,
        uuid=uuid if not uuid or uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}",
        capability="{}.{}".format(*version),
        flags=tuple(name for name, first in since if version >= first),
    )


def _rocm(torch: Any) -> list[Device] | str:
    if torch.version.hip is None:
        return "this torch is built without ROCm"
    if not torch.cuda.is_available():
        return "no AMD device, or no driver that this torch can use"
    return [_amd_device(torch, index) for index in range(torch.cuda.device_count())]


def _amd_device(torch: Any, index: int) -> Device:
    device, properties = _device(torch.cuda, index, Kind.ROCM, f"ROCm {torch.version.hip}")
    architecture, *flags = str(getattr(properties, "gcnArchName", "")).split(":")
    return replace(device, capability=architecture, flags=tuple(flags))


def _xpu(torch: Any) -> list[Device] | str:
    if not hasattr(torch, "xpu") or not torch.xpu.is_available():
        return "this torch is built without it, or no Intel device is there"
    return [_intel_device(torch, index) for index in range(torch.xpu.device_count())]


def _intel_device(torch: Any, index: int) -> Device:
    device, properties = _device(torch.xpu, index, Kind.XPU, "")
    flags = [name for name in ("has_fp16", "has_fp64", "has_atomic64") if getattr(properties, name, False)]
    return replace(
        device,
        driver=str(getattr(properties, "driver_version", "")),
        runtime=str(getattr(properties, "platform_name", "")),
        capability=str(getattr(properties, "architecture", "")),
        flags=tuple(flag.removeprefix("has_") for flag in flags),
    )


def _mps(torch: Any) -> list[Device] | str:
    if not torch.backends.mps.is_available():
        return "no Apple device, or a torch without Metal"
    total = int(torch.mps.recommended_max_memory())
    base = processor.processor()
    return [
        Device(
            kind=Kind.MPS,
            index=0,
            name=base.name,
            uuid=base.uuid.replace("CPU-", "MPS-"),
            memory_total=total,
            memory_free=max(0, min(total - int(torch.mps.driver_allocated_memory()), base.memory_free)),
            runtime="Metal",
        )
    ]


def _cpu(torch: Any) -> list[Device] | str:
    return [processor.processor(str(torch.backends.cpu.get_cpu_capability()))]


_PROBES: Final[Mapping[Kind, Callable[[Any], list[Device] | str]]] = MappingProxyType(
    {Kind.CUDA: _cuda, Kind.ROCM: _rocm, Kind.XPU: _xpu, Kind.MPS: _mps, Kind.CPU: _cpu}
)
"""In the order of preference."""


def _device(torch_module: Any, index: int, kind: Kind, runtime: str) -> tuple[Device, Any]:
    """What torch tells alike of every vendor's devices; of AMD's by the name of NVIDIA's. And what else it knows of this one."""
    properties = torch_module.get_device_properties(index)
    free, total = torch_module.mem_get_info(index)
    device = Device(
        kind=kind,
        index=index,
        name=str(properties.name),
        uuid=str(getattr(properties, "uuid", "")),
        memory_total=int(total),
        memory_free=int(free),
        runtime=runtime,
        bus=_bus(properties),
    )
    return device, properties


def _bus(properties: Any) -> str:
    """PCI address as the system writes it; empty where torch does not tell."""
    parts = [getattr(properties, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
    if None in parts:
        return ""
    domain, bus, slot = parts
    return f"{domain:04x}:{bus:02x}:{slot:02x}.0"
