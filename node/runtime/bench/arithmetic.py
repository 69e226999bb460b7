"""Matrix products per number format, memory and transfers: each a `Task` that runs one round and says how much it did a second.

A product of n x n matrices is 2 n^3 operations; a copy moves every byte twice, a read once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from node.runtime.hal.devices import Device, Kind
from protocol.benchmark import Skipped

if TYPE_CHECKING:
    from torch import Tensor

ON_HOST: Final = "the device's memory is the host's: nothing is transferred"


@dataclass(frozen=True, slots=True)
class Size:
    """How much is computed. `full` and `quick` differ in exactness, not in kind."""

    matrix: int
    buffer: int
    """Bytes of memory that is copied and read."""
    seconds: float
    """Least length of one round."""


def size_for(device: Device, *, quick: bool) -> Size:
    host = device.kind is Kind.CPU
    matrix = (1024 if host else 8192) // (2 if quick else 1)
    buffer = min((256 << 20) if host else (1 << 30), device.memory_free // 8)
    return Size(matrix, max(1 << 20, buffer) // (2 if quick else 1) // 4 * 4, 0.05 if quick else 0.2)


class Task:
    """One thing to measure."""

    def __init__(
        self, name: str, unit: str, amount: float, work: Callable[[], object], seconds: float, wait: Callable[[], None]
    ) -> None:
        """`amount`: of units that one call of `work` does. `wait`: until the device is done."""
        self.name = name
        self.unit = unit
        self._amount = amount
        self._work = work
        self._seconds = seconds
        self._wait = wait
        self._repeats = 0

    def round(self) -> float:
        """Units a second. The first round warms up and finds out how often a round repeats."""
        if not self._repeats:
            self._time(1)
            self._repeats = max(1, math.ceil(self._seconds / max(self._time(1), 1e-9)))
        return self._amount * self._repeats / self._time(self._repeats)

    def _time(self, repeats: int) -> float:
        self._wait()
        began = time.perf_counter()
        for _ in range(repeats):
            self._work()
        self._wait()
        return time.perf_counter() - began


def waiter(device: Device) -> Callable[[], None]:
    """Waits until everything that was asked of the device is done."""
    if device.kind is Kind.CPU:
        return lambda: None
    name = device.torch_name
    return lambda: torch.accelerator.synchronize(name)


def tasks(device: Device, size: Size, seed: int) -> Iterator[Task | Skipped]:
    """Everything that can be measured of this device, and why not the rest. `seed` fills the matrices."""
    yield from _products(device, size, seed)
    yield from _memory(device, size)
    yield from _transfers(device, size)


def product(device: Device, dtype: str, n: int, seed: int) -> Callable[[], Tensor]:
    """The product of two n x n matrices of that format."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == "int8":
        left, right = (
            torch.randint(-128, 128, (n, n), generator=generator, dtype=torch.int8).to(device.torch_name) for _ in "ab"
        )
        multiply = torch._int_mm  # the one int8 product that torch has; int32 out
    else:
        left, right = (
            torch.randn(n, n, generator=generator).to(device.torch_name, getattr(torch, dtype)) for _ in "ab"
        )
        multiply = torch.mm
    return lambda: multiply(left, right)


def _products(device: Device, size: Size, seed: int) -> Iterator[Task | Skipped]:
    for dtype in ("float32", "bfloat16", "float16", "int8"):
        name, unit = f"matmul_{dtype}", "OP/s" if dtype == "int8" else "FLOP/s"
        why = _senseless(device, dtype)
        if not why:
            try:
                work = product(device, dtype, size.matrix, seed)
                work()
            except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
                why = f"torch computes no such product here: {str(error).splitlines()[0][:150] if str(error) else '?'}"
            else:
                yield Task(name, unit, 2.0 * size.matrix**3, work, size.seconds, waiter(device))
        if why:
            yield Skipped(name, why)


def _senseless(device: Device, dtype: str) -> str:
    """Why a format is not measured where it would only be emulated."""
    if dtype == "float16" and device.kind is Kind.CPU and "avx512_fp16" not in device.flags:
        return "this processor has no fp16 arithmetic: torch emulates it, a hundred times slower than bfloat16"
    if dtype == "bfloat16" and device.kind is Kind.CUDA and "bf16" not in device.flags:
        return f"compute capability {device.capability} has no bfloat16 units"
    return ""


def _memory(device: Device, size: Size) -> Iterator[Task]:
    source = torch.ones(size.buffer // 4, device=device.torch_name)
    target = torch.empty_like(source)
    wait = waiter(device)
    yield Task("memory_copy", "B/s", 2.0 * source.nbytes, lambda: target.copy_(source), size.seconds, wait)
    yield Task("memory_read", "B/s", 1.0 * source.nbytes, source.sum, size.seconds, wait)


def _transfers(device: Device, size: Size) -> Iterator[Task | Skipped]:
    names = [f"{way}_{memory}" for memory in ("pinned", "pageable") for way in ("to_device", "from_device")]
    if device.kind is Kind.CPU:
        yield from (Skipped(name, ON_HOST) for name in names)
        return
    there = torch.ones(min(size.buffer, 256 << 20) // 4, device=device.torch_name)
    for memory in ("pinned", "pageable"):
        try:
            here = torch.ones(there.shape, pin_memory=memory == "pinned")
        except (RuntimeError, NotImplementedError) as error:
            why = f"no pinned memory here: {str(error).splitlines()[0][:150]}"
            yield from (Skipped(name, why) for name in names if name.endswith(memory))
            continue
        wait, amount = waiter(device), 1.0 * here.nbytes
        yield Task(f"to_device_{memory}", "B/s", amount, lambda h=here: there.copy_(h), size.seconds, wait)
        yield Task(f"from_device_{memory}", "B/s", amount, lambda h=here: h.copy_(there), size.seconds, wait)
