"""Small operations of a step on a CPU, each in one pass over its data, compiled for the processor they run on.

A step of a small model is a thousand torch operators; what they cost besides arithmetic is more than the arithmetic. These
kernels are written in Python and compiled by Numba through LLVM: no compiler is needed on the machine. Products in
float32 and float16 stay with torch.

Rules:
- `kernels_for` gives None where they cannot be used (another device, no Numba, a trial that disagrees with torch): the
  engine then computes the same in torch operators. Nothing but speed, and the last bits of a number, depends on it; of a draw
  not even these (`field`, which is tried by itself).
- A row of a result depends on that row of the input alone, and is computed by one thread: it has the same bits in any
  company and with any number of threads.
- Kernels are given addresses. Who calls them (`calls`, `layers`, `field`) has checked dtype, shape and contiguity, and
  `PagedCache` once a step that its plan names blocks of the cache; a kernel checks nothing.
- Where the machine lacks the library of threads they use one (`compiled.shared`).
- NaN in, NaN out: a model that computes nonsense must be noticed.

`simd` is sixteen floats at a time, `heads` a head's; `norms`, `attention`, `activations`, `products`, `race` are the kernels;
`calls`, `layers` and `field` are tensors to addresses; `arena` is where weights lie; `compiled`, `objects`, `book` and `named`
are how kernels are compiled, kept and given to another process.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from node.runtime.engine.kernels.calls import Kernels

log = logging.getLogger(__name__)


@cache
def importable() -> bool:
    """Whether Numba is there; the log says when it is not."""
    try:
        import node.runtime.engine.kernels.compiled
        import node.runtime.engine.kernels.simd  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # missing, or broken by what it is built on
        log.warning("compiled kernels are not used, steps will be slower: %s", error)
        return False
    return True


def kernels_for(device: torch.device, dtype: torch.dtype, head_dim: int, sharing: int = 1) -> Kernels | None:
    """The kernels of a decoder, or None where torch's operators must do; the log says why. `sharing`: queries for each head of
    keys."""
    if device.type != "cpu" or not importable():
        return None
    from node.runtime.engine.kernels import calls, compiled

    return calls.tried(dtype, head_dim, sharing, compiled.shared())
