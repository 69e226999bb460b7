"""Devices and sensors: what is there, what is said where nothing is, and which device is chosen. On simulated hardware."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from node.errors import DeviceNotFound
from node.runtime.hal import amd, nvidia, probe, processor
from node.runtime.hal.devices import Kind
from node.runtime.hal.probe import chosen, find, with_vendor
from node.runtime.hal.readings import Process, Reading, Unavailable
from node.testing.hardware import GIB, SimulatedGpu, SimulatedNvml, simulated_torch

CARD = SimulatedGpu()
FULLER = replace(CARD, uuid="GPU-2", used=40 * GIB, bus=0x18)
SIMULATED_AMDSMI = "node.testing.simulated_amdsmi"


def test_every_kind_is_found_with_its_facts() -> None:
    found = find(
        simulated_torch(nvidia=[CARD, FULLER], intel=[replace(CARD, name="Simulated Arc", uuid="x")], apple=8 * GIB)
    )
    assert [one.kind for one in found.devices] == [Kind.CUDA, Kind.CUDA, Kind.XPU, Kind.MPS, Kind.CPU]
    first = found.devices[0]
    assert (first.torch_name, first.uuid, first.capability, first.runtime) == ("cuda:0", CARD.uuid, "9.0", "CUDA 13.0")
    assert (first.memory_total, first.memory_free, first.bus) == (80 * GIB, 79 * GIB, "0000:17:00.0")
    assert "bf16" in first.flags and "fp8" in first.flags
    assert found.absent == {Kind.ROCM: "this torch is built without ROCm"}
    assert [one.torch_name for one in found.devices[2:]] == ["xpu:0", "mps", "cpu"]
    assert found.devices[4].memory_total > 0 and found.devices[4].uuid.startswith("CPU-")


def test_amd_is_cuda_to_torch_and_rocm_to_us() -> None:
    found = find(simulated_torch(amd=[CARD]))
    card = found.devices[0]
    assert (card.kind, card.torch_name, card.capability, card.flags) == (
        Kind.ROCM,
        "cuda:0",
        "gfx942",
        ("sramecc+", "xnack-"),
    )
    assert chosen("cuda", simulated_torch(amd=[CARD])).device.kind is Kind.ROCM


@pytest.mark.parametrize(
    ("torch", "kind"),
    [
        (simulated_torch(nvidia=[CARD], intel=[CARD], apple=GIB), Kind.CUDA),
        (simulated_torch(amd=[CARD], intel=[CARD], apple=GIB), Kind.ROCM),
        (simulated_torch(intel=[CARD], apple=GIB), Kind.XPU),
        (simulated_torch(apple=GIB), Kind.MPS),
        (simulated_torch(), Kind.CPU),
    ],
)
def test_auto_takes_the_best_and_says_why(torch: Any, kind: Kind) -> None:
    choice = chosen("auto", torch)
    assert choice.device.kind is kind
    assert choice.why.startswith("engine.device is auto; the best of")
    if kind is Kind.CPU:
        assert "cuda: this torch is built without CUDA" in choice.why


def test_of_several_the_one_with_the_most_free_memory() -> None:
    choice = chosen("auto", simulated_torch(nvidia=[FULLER, CARD]))
    assert choice.device.index == 1 and "most free memory" in choice.why


def test_a_device_that_is_not_there_is_an_error_with_the_ones_that_are() -> None:
    with pytest.raises(DeviceNotFound, match="built without CUDA") as error:
        chosen("cuda:0", simulated_torch())
    assert error.value.exit_status == 7 and error.value.hint.endswith("cpu")
    with pytest.raises(DeviceNotFound, match="there are 1 devices") as error:
        chosen("cuda:3", simulated_torch(nvidia=[CARD]))
    assert "cuda:0, cpu" in error.value.hint


def test_a_broken_driver_leaves_the_processor() -> None:
    choice = chosen("auto", simulated_torch(nvidia=[CARD], broken="CUDA driver version is insufficient\nand more"))
    assert choice.device.kind is Kind.CPU
    assert "torch cannot use it: CUDA driver version is insufficient" in choice.why


# ------------------------------------------------------------------------------------------------------------ sensors


def test_nvml_answers_what_it_can_and_says_why_not_the_rest() -> None:
    nvml = SimulatedNvml([replace(CARD, ecc=False, throttle=0x1 | 0x4 | 0x40, processes=((77, 2 * GIB), (78, None)))])
    reading = nvidia.read(CARD.uuid, nvml)
    assert isinstance(reading, Reading)
    assert (reading.temperature_c, reading.power_watts, reading.power_limit_watts) == (41.0, 71.5, 700.0)
    assert reading.throttle == ("software power cap", "hardware thermal slowdown"), "an idle clock is no throttle"
    assert reading.processes == (Process(77, 2 * GIB), Process(78, None))
    assert reading.ecc_corrected is None and reading.missing["ecc_corrected"] == "Not Supported"
    assert nvml.opened == 0, "closed again"
    device = with_vendor(find(simulated_torch(nvidia=[CARD])).devices[0], reading)
    assert (device.driver, device.pcie_generation, device.pcie_width) == ("580.65.06-simulated", 5, 16)


def test_without_nvml_the_answer_is_why() -> None:
    assert nvidia.read("GPU-x", SimulatedNvml(missing=True)) == Unavailable("NVML: NVML Shared Library Not Found")
    gone = nvidia.read("GPU-x", SimulatedNvml([CARD]))
    assert str(gone) == "not available: NVML knows no device GPU-x: Not Found"


def test_amdsmi_is_asked_in_a_process_and_may_print_what_it_likes() -> None:
    reading = amd.read("0000:03:00.0", SIMULATED_AMDSMI)
    assert isinstance(reading, Reading), reading
    assert (reading.temperature_c, reading.power_watts, reading.power_limit_watts) == (44, 131, 750)
    assert reading.utilisation == 0.37 and reading.memory_total == 196_592 << 20
    assert reading.throttle == ("power limit",) and reading.processes == (Process(4711, 1 << 30),)
    assert (reading.driver, reading.pcie_generation, reading.ecc_corrected) == ("6.12.12-simulated", 5, 3)
    bare = amd.read("0000:83:00.0", SIMULATED_AMDSMI)
    assert isinstance(bare, Reading) and bare.temperature_c is None and bare.power_watts == 131
    assert bare.missing["temperature_c"] == "the device does not tell" and bare.driver is None
    assert amd.read("0000:99:00.0", SIMULATED_AMDSMI) == Unavailable("amdsmi knows no device at 0000:99:00.0")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise KeyError('libamd_smi.so')", "KeyError: 'libamd_smi.so'"),
        ("import os; os._exit(3)", "status 3 and said nothing"),
        ("import os; print('{}x', flush=True); os._exit(0)", "no answer that can be read"),
    ],
)
def test_a_library_that_fails_in_its_own_way_fails_in_its_own_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, why: str
) -> None:
    (tmp_path / "bad_amdsmi.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = amd.ask("bad_amdsmi")
    assert isinstance(answer, Unavailable) and why in answer.why


def test_without_the_package_the_answer_is_why() -> None:
    if importlib.util.find_spec("amdsmi") is not None:
        pytest.skip("amdsmi is installed here")
    assert amd.ask() == Unavailable("amdsmi: ModuleNotFoundError: No module named 'amdsmi'")


def test_the_processor_is_read_and_others_load_on_it_is_seen() -> None:
    load = processor.Load()
    burn = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent("import time\nend = time.time() + 1.2\nwhile time.time() < end: pass")]
    )
    reading = processor.read(0.8)
    _, others = load.shares()
    burn.wait()
    assert reading.utilisation is not None and 0 < reading.utilisation <= 1
    assert others > 0, "another process computed, and it was not us"
    assert reading.memory_used is not None and reading.memory_used < (reading.memory_total or 0)
    assert "superuser" in reading.missing["power_watts"]


# --------------------------------------------------------------------------------------------------------- the child


def test_devices_are_seen_by_a_child_once_and_its_failure_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child's torch is a simulated one here: what it says, or how it fails, is what a node hears."""
    probe._asked.cache_clear()
    started: list[list[str]] = []
    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        started.append(command)
        options["env"]["PYTHONPATH"] = f"{tmp_path}:{options['env']['PYTHONPATH']}"
        return real(command, **options)

    monkeypatch.setattr(probe.subprocess, "run", run)
    try:
        (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13 is missing')")
        with pytest.raises(DeviceNotFound, match="libcudart"):
            find()
        (tmp_path / "torch.py").write_text(
            "import sys\nfrom node.testing.hardware import SimulatedGpu, simulated_torch\n"
            "print('a library that prints')\nsys.modules['torch'] = simulated_torch(nvidia=[SimulatedGpu()])\n"
        )
        assert [one.kind for one in find().devices] == [Kind.CUDA, Kind.CPU]
        assert find().devices[0].uuid == CARD.uuid
        assert len(started) == 2, "a failure is asked again, an answer is not"
        probe._asked.cache_clear()
        probe.look_ahead()
        assert find().devices[0].uuid == CARD.uuid
        assert len(started) == 3, "who asks while it is being looked waits for that answer"
        monkeypatch.setattr(processor, "memory", lambda: (123, 45))
        assert (find().devices[1].memory_total, find().devices[1].memory_free) == (123, 45), "as it is now"
    finally:
        probe._asked.cache_clear()
