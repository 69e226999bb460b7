"""How kernels are compiled, or taken from the process's book of those that were compiled before.

Sums may be taken in the compiler's order, and products fused into them; nothing may assume that there is no NaN.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, Final, ParamSpec

import numba
import numpy as np
import torch
from numba import njit, types
from numba.core.errors import NumbaError

from node.runtime.engine.kernels import objects
from node.runtime.engine.kernels.book import BOOK

ADDRESS: Final = types.int64
COUNT: Final = types.int64
FLOAT: Final = types.float32

STORED: Final = {torch.float32: np.float32, torch.bfloat16: np.uint16}
"""What numbers of a dtype are to a kernel."""

numba.config.THREADING_LAYER = "omp"
"""OpenMP, as torch, so that the same settings hold for both: their threads wait without spinning. Where torch brings its own
copy of the library, and it does on Linux, there are two pools; only one of them works at a time."""

log = logging.getLogger(__name__)
_P = ParamSpec("_P")

_LOOSE: Final = {"reassoc", "contract", "nsz", "arcp"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function to compile, the types of its arguments, and whether its `prange` loops are shared by all threads."""

    run: Callable[..., None]
    arguments: tuple[Any, ...]
    parallel: bool


def kernel(*arguments: Any, parallel: bool = False) -> Callable[[Callable[..., None]], Kernel]:
    """The function below it as a kernel of these arguments."""
    return lambda run: Kernel(run, arguments, parallel)


def family(make: Callable[_P, Kernel]) -> Callable[_P, Callable[..., None]]:
    """Kernels that differ in what chose them: number types, sizes, `parallel`. Each is compiled once, when it is asked for.
    Raises `RuntimeError` when it cannot be compiled here."""

    @cache
    @wraps(make)
    def member(*chosen: Any) -> Callable[..., None]:
        return _compiled(
            " ".join([make.__name__, *(getattr(one, "__name__", str(one)) for one in chosen)]), make(*chosen)
        )

    return member


def _compiled(name: str, kernel: Kernel) -> Callable[..., None]:
    # Symbols are made from a function's name, and one name must never be two functions: all of them are called `run`, and what
    # was compiled elsewhere was counted elsewhere.
    kernel.run.__name__ = kernel.run.__qualname__ = name.replace(" ", "_")
    options = {"fastmath": _LOOSE, "error_model": "numpy", "nogil": True, "parallel": kernel.parallel}
    compiled: Any = njit(**options)(kernel.run)
    signature = types.void(*kernel.arguments)
    given = BOOK.given.get(name)
    if given is not None and BOOK.stamp == objects.stamp():
        try:
            compiled.add_overload(objects.put_back(given, kernel.run, signature, parallel=kernel.parallel))
        except Exception as error:  # whatever Numba makes of it: compiling is always right
            log.warning("a kernel is compiled again: %s: %s", name, error)
    if not compiled.overloads:
        BOOK.compiled.append(name)
        try:
            compiled.compile(signature)
        except NumbaError as error:
            raise RuntimeError(f"a kernel cannot be compiled: {error}") from error
    compiled.disable_compile()
    run: Callable[..., None] = compiled
    return run


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
