"""How kernels are compiled.

Sums may be taken in the compiler's order, and products fused into them; nothing may assume that there is no NaN.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Final, cast

import numba
import numpy as np
import torch
from numba import njit, types
from numba.core.errors import NumbaError

ADDRESS: Final = types.int64
COUNT: Final = types.int64
FLOAT: Final = types.float32

STORED: Final = {torch.float32: np.float32, torch.bfloat16: np.uint16}
"""What numbers of a dtype are to a kernel."""

numba.config.THREADING_LAYER = "omp"
"""OpenMP, as torch, so that the same settings hold for both: their threads wait without spinning. Where torch brings its own
copy of the library, and it does on Linux, there are two pools; only one of them works at a time."""

log = logging.getLogger(__name__)

_LOOSE: Final = {"reassoc", "contract", "nsz", "arcp"}


def kernel(*arguments: Any, parallel: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile a function of these arguments now. `parallel`: its `prange` loops are shared by all threads.

    Raises `RuntimeError` when it cannot be compiled here.
    """
    compiled: Callable[..., Any] = njit(
        types.void(*arguments), fastmath=_LOOSE, error_model="numpy", parallel=parallel, nogil=True
    )

    def compile_(function: Callable[..., None]) -> Callable[..., None]:
        try:
            return cast("Callable[..., None]", compiled(function))
        except NumbaError as error:
            raise RuntimeError(f"a kernel cannot be compiled: {error}") from error

    return compile_


def demand(fits: bool, what: str, *tensors: torch.Tensor) -> None:
    """Raise `RuntimeError` unless `fits`: addresses of these tensors are about to be handed over."""
    if not fits:
        told = ", ".join(f"{one.dtype} {list(one.shape)} in steps of {list(one.stride())}" for one in tensors)
        raise RuntimeError(f"{what}: cannot be computed from {told}")


def shared() -> bool:
    """Whether kernels are to be shared by threads: as many as torch has now, for what the calling thread starts.

    Not where torch has one, nor where the machine lacks the library of threads (libgomp on Linux).
    """
    threads = torch.get_num_threads()
    if threads == 1 or not _threads_at_hand():
        return False
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    return True


@cache
def _threads_at_hand() -> bool:
    try:
        numba.get_num_threads()  # it loads the library
    except ValueError as error:
        log.warning("compiled kernels use one thread: %s", str(error).partition("\n")[0])
        return False
    return True
