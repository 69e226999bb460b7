"""On a real card: what torch and the vendor's library say of it agree, and its arithmetic can be measured."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU that this torch can use", allow_module_level=True)

from node.runtime.bench.arithmetic import Task, size_for, tasks  # noqa: E402
from node.runtime.bench.measure import Nonce, measure  # noqa: E402
from node.runtime.hal.devices import Device, Kind  # noqa: E402
from node.runtime.hal.probe import chosen, read, with_vendor  # noqa: E402
from node.runtime.hal.readings import Reading, Unavailable  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def card() -> Device:
    device = chosen("auto").device
    assert device.kind in (Kind.CUDA, Kind.ROCM), "auto prefers a card"
    return device


def test_its_sensors_are_those_of_the_same_card(card: Device) -> None:
    reading = read(card)
    if isinstance(reading, Unavailable):
        pytest.skip(str(reading))
    assert isinstance(reading, Reading)
    assert reading.memory_total is not None and abs(reading.memory_total - card.memory_total) < card.memory_total // 20
    assert reading.temperature_c is None or 0 < reading.temperature_c < 120
    assert with_vendor(card, reading).driver


def test_products_memory_and_transfers_have_figures(card: Device) -> None:
    found = {one.name: one for one in tasks(card, size_for(card, quick=True), 1) if isinstance(one, Task)}
    assert {"matmul_float32", "matmul_float16", "memory_copy", "to_device_pinned", "from_device_pageable"} <= set(found)
    rates = {name: one.round() for name, one in found.items()}
    assert rates["matmul_float16"] > rates["matmul_float32"] > 1e11
    assert rates["memory_copy"] > 5e10 and rates["to_device_pinned"] > 1e9


def test_a_quick_benchmark_without_a_model(card: Device) -> None:
    document = measure(card, Nonce(bytes(32), "random"), None, threads=1, quick=True)
    assert document.device.kind == card.kind.value and document.figures
    assert document.stable == (not document.reasons)
