"""Which kernels this process was given ready, and which it had to compile. Imports nothing: it is filled before Numba is loaded.

Rules:
- What is given is machine code and will be run: whoever gives it must have it from a process that saw no model.
- It counts only under the same stamp (`objects.stamp`). What does not fit is compiled, as if nothing had been given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class ObjectCode:
    """One compiled kernel."""

    name: str
    """Its family and the arguments that chose it, as `compiled.family` writes them: "attend uint16 64 False"."""
    number: int
    tags: tuple[str, ...]
    """Number and tags are part of the symbols in `code`."""
    code: bytes
    """An object file."""
    module: bytes
    """What is defined in it, as LLVM's bitcode."""


class Book:
    """Of one process, as its kernels are."""

    def __init__(self) -> None:
        self.stamp = ""
        self.given: dict[str, ObjectCode] = {}
        self.compiled: list[str] = []
        """Names of those that were compiled here, in order."""

    def give(self, stamp: str, kernels: Iterable[ObjectCode]) -> None:
        """To be used from now on. Kernels that are in use already stay as they are."""
        self.stamp, self.given = stamp, {kernel.name: kernel for kernel in kernels}


BOOK: Final = Book()
