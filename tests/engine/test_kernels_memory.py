"""Kernels are given addresses: nothing outside their tensors is read or written, and what does not fit is refused.

Each tensor, results included, lies at the very end or the very beginning of its pages, and the page beyond can be neither
read nor written: a byte too far kills the process, which is therefore a child.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

from node.runtime.engine import quantize  # noqa: E402
from node.runtime.engine.blocks import BLOCK_TOKENS  # noqa: E402
from node.runtime.engine.errors import IntegrityError  # noqa: E402
from node.runtime.engine.kernels import layers  # noqa: E402
from node.runtime.engine.kernels.calls import Kernels  # noqa: E402
from node.runtime.engine.paged import Attention, PagedCache, Plan, Span  # noqa: E402

PAGE = mmap.PAGESIZE
DTYPES = [torch.float32, torch.bfloat16]


class Guarded:
    """Allocates tensors against a page that nobody may touch: behind the last byte, or before the first."""

    def __init__(self, *, behind: bool) -> None:
        self.behind = behind
        self._kept: list[Any] = []
        self._protect = ctypes.CDLL(None, use_errno=True).mprotect
        self._empty = torch.empty

    def empty(self, *shape: Any, dtype: Any = None) -> Any:
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        dtype = dtype or torch.float32
        size = math.prod(shape) * dtype.itemsize
        pages = -(-size // PAGE) * PAGE
        if not size:
            return self._empty(shape, dtype=dtype)
        area = mmap.mmap(-1, pages + PAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(area))
        wall = first + pages if self.behind else first
        if self._protect(ctypes.c_void_p(wall), PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        self._kept.append(area)
        offset = pages - size if self.behind else PAGE
        return torch.frombuffer(area, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)

    def __call__(self, tensor: Any) -> Any:
        """A copy."""
        return self.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def normal(*shape: int, seed: int = 1, dtype: Any = torch.float32) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run_row_kernels(guard: Guarded, dtype: Any) -> None:
    some = Kernels(dtype, 48, parallel=False)
    for rows in (1, 2, 3, 5, 16):
        for width in (1, 15, 16, 17, 48, 577):
            x, weight = guard(normal(rows, width, dtype=dtype)), guard(normal(width))
            some.norm(x, weight, 1e-5)
            both = guard(normal(rows, 2 * width, dtype=dtype))
            for name in ("silu", "gelu_tanh"):
                gate = some.gate(name)
                assert gate is not None
                gate(both)
        heads = guard(normal(rows, 5, 48, dtype=dtype))
        for turned in (2, 16, 24, 48):
            cos, sin = guard(normal(rows, 1, turned, dtype=dtype)), guard(normal(rows, 1, turned, dtype=dtype))
            some.turn(heads[:, 2:, :turned], cos, sin)
            some.turn(heads[:, :2, 48 - turned :], cos, sin)
        cache = guard(normal(4, 3 * BLOCK_TOKENS, 48, dtype=dtype))
        slots = guard(torch.randperm(3 * BLOCK_TOKENS)[:rows])
        slots[0], slots[-1] = 3 * BLOCK_TOKENS - 1, 0
        some.write(cache, slots, heads[:, 1:])
        length = torch.arange(rows) % 33 + 1
        length[0] = 3 * BLOCK_TOKENS
        tables = guard(torch.cat((length[:, None], torch.tensor([[2, 0, 1]]).expand(rows, 3)), dim=1))
        for window in (None, 1, 17, 100):
            some.attend(cache, tables, heads[:, :4], 0.1, window, 5.0)


def run_attention(guard: Guarded, dtype: Any) -> None:
    """Queries that are computed together, the last ones again, and blocks that are fetched ahead at the cache's ends."""
    for dim, shares in ((16, (3, 5, 9)), (80, (2,))):
        for sharing in shares:
            some = Kernels(dtype, dim, sharing, parallel=False)
            for kv_heads in (1, 3):
                for blocks in (1, 2, 5):
                    cache = guard(normal(2 * kv_heads, blocks * BLOCK_TOKENS, dim, dtype=dtype))
                    heads = guard(normal(3, kv_heads * sharing + 1, dim, dtype=dtype))
                    lengths = torch.tensor([blocks * BLOCK_TOKENS, 1, blocks * BLOCK_TOKENS - 15])
                    order = torch.arange(blocks - 1, -1, -1).expand(3, blocks)
                    tables = guard(torch.cat((lengths[:, None], order), dim=1))
                    for window in (None, 1, 17):
                        some.attend(cache, tables, heads[:, 1:] if guard.behind else heads[:, :-1], 0.1, window, 0.0)


def run_layers(guard: Guarded, dtype: Any) -> None:
    for out, inputs in ((64, 32), (48, 64), (80, 96), (16, 32), (1, 32), (65, 33), (63, 577)):
        weight, bias = normal(out, inputs), normal(out)
        made: list[Any] = [layers.KernelBFloat16(weight.to(dtype), bias)] if dtype is torch.bfloat16 else []
        made += [quantize._kernel(scheme, dtype)(weight, bias) for scheme in ("int8", "fine")]
        if inputs % 32 == 0:
            made.append(quantize._kernel("int4", dtype)(weight, bias))
        for layer in made:
            for name in ("_held", "_scales", "_sums", "_sizes", "_bias"):
                if getattr(layer, name, None) is not None:
                    setattr(layer, name, guard(getattr(layer, name)))
            for rows in (0, 1, 2, 3, 4, 5, 8, 17):
                layer(guard(normal(rows, inputs, dtype=dtype)))


PARTS = {"rows": run_row_kernels, "attention": run_attention, "layers": run_layers}


def run(part: str) -> None:
    """In the child."""
    torch.set_num_threads(1)
    for guard in (Guarded(behind=True), Guarded(behind=False)):
        torch.empty = guard.empty
        torch.empty_like = lambda x, guard=guard: guard.empty(x.shape, dtype=x.dtype)
        for dtype in DTYPES:
            PARTS[part](guard, dtype)
    print("all ran")


def reach_beyond(behind: bool) -> None:
    """In the child: what the guard is there for."""
    tensor = Guarded(behind=behind)(torch.zeros(3, 7))
    ctypes.memset(tensor.data_ptr() + (tensor.nbytes if behind else -1), 0, 1)


def child(call: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import test_kernels_memory as t; t.{call}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path))},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="pages are guarded as Linux does it")
@pytest.mark.parametrize("part", PARTS)
def test_nothing_beyond_a_tensor_is_touched(part: str) -> None:
    done = child(f"run({part!r})")
    assert done.returncode == 0 and done.stdout == "all ran\n", done.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="pages are guarded as Linux does it")
@pytest.mark.parametrize("behind", [True, False])
def test_the_guard_kills(behind: bool) -> None:
    assert child(f"reach_beyond({behind})").returncode < 0


# ------------------------------------------------------------------------------------------------ what is refused


def test_rows_that_do_not_fit_are_refused() -> None:
    some = Kernels(torch.float32, 16, parallel=False)
    gate = some.gate("silu")
    assert gate is not None
    x, weight, cos = normal(3, 32), normal(32), normal(3, 1, 16)
    heads = normal(3, 6, 16)
    refused: list[Any] = [
        lambda: some.norm(x, normal(31), 1e-5),
        lambda: some.norm(x, normal(64)[::2], 1e-5),
        lambda: some.norm(x, weight.double(), 1e-5),
        lambda: some.norm(x.bfloat16(), weight, 1e-5),
        lambda: some.norm(x.double(), weight, 1e-5),
        lambda: gate(normal(3, 33)),
        lambda: gate(normal(32)),
        lambda: gate(x.bfloat16()),
        lambda: some.turn(heads, cos[:2], cos),
        lambda: some.turn(heads, cos, normal(3, 1, 8)),
        lambda: some.turn(heads, normal(3, 1, 32), normal(3, 1, 32)),
        lambda: some.turn(heads, cos.bfloat16(), cos.bfloat16()),
        lambda: some.turn(heads, cos.expand(3, 1, 16)[:, :, :], normal(1, 1, 16).expand(3, 1, 16)),
        lambda: some.turn(heads.transpose(1, 2), cos, cos),
        lambda: some.turn(heads.double(), cos, cos),
    ]
    for one in refused:
        with pytest.raises(RuntimeError, match="cannot be computed from"):
            one()
    # Strided gates are not refused but copied.
    both = normal(3, 64)
    assert torch.equal(gate(both[:, ::2]), gate(both[:, ::2].contiguous()))


def test_attention_that_does_not_fit_is_refused() -> None:
    some = Kernels(torch.float32, 16, parallel=False)
    cache, slots = normal(4, 48, 16), torch.tensor([3, 17, 47])
    q, kv = normal(3, 6, 16), normal(3, 4, 16)
    tables = torch.tensor([[20, 2, 1], [16, 0, 0], [1, 1, 0]])
    refused: list[Any] = [
        lambda: some.write(cache, slots.int(), kv),
        lambda: some.write(cache, slots[:2], kv),
        lambda: some.write(cache, slots[:, None], kv),
        lambda: some.write(cache, torch.arange(6)[::2], kv),
        lambda: some.write(cache[:3], slots, kv),
        lambda: some.write(cache[:, ::2], slots, kv),
        lambda: some.write(cache[:, :, :8], slots, kv[:, :, :8]),
        lambda: some.write(cache.bfloat16(), slots, kv),
        lambda: some.write(cache, slots, kv.bfloat16()),
        lambda: some.write(cache, slots, normal(3, 8, 16)[:, ::2]),
        lambda: some.attend(cache, tables.int(), q, 1.0, None, 0.0),
        lambda: some.attend(cache, tables[:2], q, 1.0, None, 0.0),
        lambda: some.attend(cache, tables[:, ::2], q, 1.0, None, 0.0),
        lambda: some.attend(cache, tables, q[:, :5], 1.0, None, 0.0),
        lambda: some.attend(cache, tables, normal(3, 12, 16)[:, ::2], 1.0, None, 0.0),
        lambda: some.attend(cache, tables, q.bfloat16(), 1.0, None, 0.0),
        lambda: some.attend(cache.bfloat16(), tables, q, 1.0, None, 0.0),
        lambda: some.attend(cache[:, :40], tables, q, 1.0, None, 0.0),
        lambda: some.attend(normal(4, 40, 16), tables, q, 1.0, None, 0.0),
        lambda: some.attend(cache[:1], tables, q, 1.0, None, 0.0),
        lambda: some.attend(normal(4, 48, 32), tables, normal(3, 6, 32), 1.0, None, 0.0),
    ]
    for one in refused:
        with pytest.raises(RuntimeError, match="cannot be computed from"):
            one()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_refuse_what_is_not_as_wide_as_they_are(dtype: Any) -> None:
    weight, bias = normal(64, 96), normal(64)
    made: list[Any] = [layers.KernelBFloat16(weight.to(dtype), bias)] if dtype is torch.bfloat16 else []
    made += [quantize._kernel(scheme, dtype)(weight, bias) for scheme in ("int8", "fine", "int4")]
    for layer in made:
        for rows in (1, 3, 4, 20):
            for width in (32, 95, 97, 192):
                with pytest.raises(RuntimeError):
                    layer(normal(rows, width, dtype=dtype))
        other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
        for wrong in (normal(96, dtype=dtype), normal(2, 2, 96, dtype=dtype), normal(2, 96, dtype=other)):
            with pytest.raises(RuntimeError, match="cannot be computed from"):
                layer(wrong)
        # Views are copied, not misread.
        x = normal(4, 192, dtype=dtype)
        assert torch.equal(layer(x[:, ::2]), layer(x[:, ::2].contiguous()))
        assert torch.equal(layer(x[::2, 96:]), layer(x[::2, 96:].contiguous()))
        assert torch.equal(layer(normal(96, 2, dtype=dtype).t()), layer(normal(96, 2, dtype=dtype).t().contiguous()))


def test_a_plan_that_names_no_block_of_the_cache_is_refused() -> None:
    device = torch.device("cpu")
    cache = PagedCache(1, 2, 16, 4, torch.float32, device, Kernels(torch.float32, 16, parallel=False))
    q, kv, how = normal(1, 2, 16), normal(1, 4, 16), Attention(1.0)
    cache.attend(Plan([Span([3, 0], 20, 1)], device), 0, how, q, kv)
    for table in ([4, 0], [0, 4], [-1, 0], [0, -1], [1 << 40, 0]):
        with pytest.raises(IntegrityError):
            cache.attend(Plan([Span(table, 20, 1)], device), 0, how, q, kv)
    with pytest.raises((IntegrityError, IndexError)):  # a chunk writes, too
        cache.attend(Plan([Span([1, 9], 15, 2)], device), 0, how, normal(2, 2, 16), normal(2, 4, 16))
    with pytest.raises(IndexError):
        Plan([Span([1], 16, 1)], device)  # a table that is too short
