"""How kernels are compiled.

Sums may be taken in the compiler's order, and products fused into them; nothing may assume that there is no NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numba
import numpy as np
import torch
from numba import njit, types

ADDRESS: Final = types.int64
COUNT: Final = types.int64
FLOAT: Final = types.float32

STORED: Final = {torch.float32: np.float32, torch.bfloat16: np.uint16}
"""What numbers of a dtype are to a kernel."""

numba.config.THREADING_LAYER = "omp"
"""OpenMP, as torch: with the same library both have one pool of threads."""

_LOOSE: Final = {"reassoc", "contract", "nsz", "arcp"}


def kernel(*arguments: Any, parallel: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile a function of these arguments now. `parallel`: its `prange` loops are shared by all threads."""
    compiled: Callable[..., Any] = njit(
        types.void(*arguments), fastmath=_LOOSE, error_model="numpy", parallel=parallel, nogil=True
    )
    return compiled
