"""Kernels by the names under which they are kept: for the process that compiles them ahead of engines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np

from node.runtime.engine.kernels import attention, norms, objects, products
from node.runtime.engine.kernels.book import ObjectCode

log = logging.getLogger(__name__)
FAMILIES: Final[dict[str, Callable[..., Any]]] = {
    make.__name__: make
    for make in (
        *(attention.attend, attention.write),
        *(norms.rms_norm, norms.silu_gate, norms.gelu_tanh_gate, norms.turn),
        *(products.product_bfloat16, products.product_int8, products.product_int4),
    )
}
_WORDS: Final = {"float32": np.float32, "uint16": np.uint16, "int8": np.int8, "True": True, "False": False}


def by_names(names: Iterable[str]) -> list[ObjectCode]:
    """Compiled here and now. What no kernel is called is left out, and the log says so."""
    found = []
    for name in names:
        family, *words = name.split(" ")
        try:
            chosen = [_WORDS[word] if word in _WORDS else int(word) for word in words]
            found.append(objects.taken(name, FAMILIES[family](*chosen)))
        except Exception as error:  # a name may come from anybody, and choose what does not compile
            log.warning("no kernel %r: %s", name, str(error).partition("\n")[0][:200])
    return found
