"""The process that asks `amdsmi` for `node.runtime.hal.amd`: one line of JSON on stdout, last, whatever the library prints."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from node.runtime.hal.amd import AmdAnswer, AmdDevice

_MIB = 1 << 20


def main(module: str) -> None:
    try:
        answer = AmdAnswer(devices=tuple(_devices(importlib.import_module(module))))
    except Exception as error:  # the boundary of the process: whatever it is, the parent is to hear it in words
        answer = AmdAnswer(error=f"{type(error).__name__}: {error}"[:500])
    sys.stdout.write("\n" + msgspec.json.encode(answer).decode() + "\n")
    sys.stdout.flush()


def _devices(smi: Any) -> list[AmdDevice]:
    smi.amdsmi_init()
    try:
        return [_device(smi, handle) for handle in smi.amdsmi_get_processor_handles()]
    finally:
        smi.amdsmi_shut_down()


def _device(smi: Any, handle: Any) -> AmdDevice:
    def ask(question: Callable[[], Any]) -> Any:
        """None for what this device, or this version of the library, does not answer: it says so with "N/A" or by raising."""
        try:
            value = question()
        except (smi.AmdSmiException, AttributeError, KeyError, TypeError):
            return None
        return None if value == "N/A" else value

    def part(question: Callable[[Any], dict[str, Any]], *path: str) -> Any:
        value: Any = ask(lambda: question(handle))
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return None if value == "N/A" else value

    cap = part(smi.amdsmi_get_power_cap_info, "power_cap")
    used, total = part(smi.amdsmi_get_gpu_vram_usage, "vram_used"), part(smi.amdsmi_get_gpu_vram_usage, "vram_total")
    activity = part(smi.amdsmi_get_gpu_activity, "gfx_activity")
    power = part(smi.amdsmi_get_power_info, "current_socket_power")
    if not power:
        power = part(smi.amdsmi_get_power_info, "average_socket_power")
    sensor = (smi.AmdSmiTemperatureType.HOTSPOT, smi.AmdSmiTemperatureMetric.CURRENT)
    running = ask(lambda: smi.amdsmi_get_gpu_process_list(handle))
    return AmdDevice(
        bus=str(smi.amdsmi_get_gpu_device_bdf(handle)),
        uuid=str(ask(lambda: smi.amdsmi_get_gpu_device_uuid(handle)) or ""),
        driver=str(part(smi.amdsmi_get_gpu_driver_info, "driver_version") or ""),
        temperature_c=ask(lambda: smi.amdsmi_get_temp_metric(handle, *sensor)),
        utilisation=None if activity is None else activity / 100,
        memory_used=None if used is None else used * _MIB,
        memory_total=None if total is None else total * _MIB,
        power_watts=power,
        power_limit_watts=None if cap is None else cap / 1_000_000,  # microwatts
        clock_mhz=ask(lambda: smi.amdsmi_get_clock_info(handle, smi.AmdSmiClkType.GFX)["clk"]),
        ecc_corrected=part(smi.amdsmi_get_gpu_total_ecc_count, "correctable_count"),
        ecc_uncorrected=part(smi.amdsmi_get_gpu_total_ecc_count, "uncorrectable_count"),
        throttle=_throttle(ask(lambda: smi.amdsmi_get_violation_status(handle))),
        processes=None if running is None else tuple((one["pid"], one["memory_usage"]["vram_mem"]) for one in running),
        pcie_generation=part(smi.amdsmi_get_pcie_info, "pcie_static", "pcie_interface_version"),
        pcie_width=part(smi.amdsmi_get_pcie_info, "pcie_metric", "pcie_width"),
    )


def _throttle(violations: Any) -> tuple[str, ...]:
    if not isinstance(violations, dict):
        return ()
    words = {
        "active_prochot_thrm": "processor hot",
        "active_ppt_pwr": "power limit",
        "active_socket_thrm": "socket temperature",
        "active_vr_thrm": "regulator temperature",
        "active_hbm_thrm": "memory temperature",
    }
    return tuple(word for name, word in words.items() if violations.get(name) is True)
