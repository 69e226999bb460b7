"""A simulated `amdsmi`: two cards that are not there, answering in the forms of version 7.0, with its "N/A" and its errors.

It prints when it is imported, as the real one does, so that whoever reads its process's output must cope with it.
"""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

print("simulated amdsmi: this is what the real one prints when it is imported")  # noqa: T201


class AmdSmiException(Exception):
    """As the real one."""


class AmdSmiTemperatureType(Enum):
    HOTSPOT = 1


class AmdSmiTemperatureMetric(Enum):
    CURRENT = 0


class AmdSmiClkType(Enum):
    GFX = 0


_FULL = SimpleNamespace(bdf="0000:03:00.0", bare=False)
_BARE = SimpleNamespace(bdf="0000:83:00.0", bare=True)


def amdsmi_init() -> None: ...


def amdsmi_shut_down() -> None: ...


def amdsmi_get_processor_handles() -> list[Any]:
    return [_FULL, _BARE]


def amdsmi_get_gpu_device_bdf(handle: Any) -> str:
    return str(handle.bdf)


def amdsmi_get_gpu_device_uuid(handle: Any) -> str:
    return "5aff74a1-0000-1000-8000-simulated000"


def amdsmi_get_gpu_driver_info(handle: Any) -> dict[str, Any]:
    return {
        "driver_name": "amdgpu",
        "driver_version": "N/A" if handle.bare else "6.12.12-simulated",
        "driver_date": "N/A",
    }


def amdsmi_get_power_cap_info(handle: Any) -> dict[str, Any]:
    if handle.bare:
        raise AmdSmiException("not supported")
    return {"power_cap": 750_000_000, "default_power_cap": 750_000_000}


def amdsmi_get_gpu_vram_usage(handle: Any) -> dict[str, Any]:
    return {"vram_total": 196_592, "vram_used": 285}


def amdsmi_get_gpu_activity(handle: Any) -> dict[str, Any]:
    return {"gfx_activity": "N/A" if handle.bare else 37, "umc_activity": 2, "mm_activity": "N/A"}


def amdsmi_get_power_info(handle: Any) -> dict[str, Any]:
    return {"current_socket_power": "N/A", "average_socket_power": 131}


def amdsmi_get_temp_metric(handle: Any, sensor: AmdSmiTemperatureType, metric: AmdSmiTemperatureMetric) -> int:
    if handle.bare:
        raise AmdSmiException("not supported")
    return 44


def amdsmi_get_clock_info(handle: Any, kind: AmdSmiClkType) -> dict[str, Any]:
    return {"clk": "N/A" if handle.bare else 2100}


def amdsmi_get_gpu_total_ecc_count(handle: Any) -> dict[str, Any]:
    return {"correctable_count": 3, "uncorrectable_count": 0, "deferred_count": 0}


def amdsmi_get_violation_status(handle: Any) -> dict[str, Any]:
    if handle.bare:
        raise AmdSmiException("not supported")
    return {"active_prochot_thrm": False, "active_ppt_pwr": True, "active_socket_thrm": "N/A", "active_vr_thrm": False}


def amdsmi_get_gpu_process_list(handle: Any) -> list[dict[str, Any]]:
    return [] if handle.bare else [{"name": "python3", "pid": 4711, "memory_usage": {"vram_mem": 1 << 30}}]


def amdsmi_get_pcie_info(handle: Any) -> dict[str, Any]:
    return {
        "pcie_static": {"pcie_interface_version": "N/A" if handle.bare else 5, "max_pcie_width": 16},
        "pcie_metric": {"pcie_width": 16, "pcie_speed": 32_000},
    }
