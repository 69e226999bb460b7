"""Kernels by the names under which they are kept: for the process that compiles them ahead of engines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np

from node.runtime.engine.kernels import attention, norms, objects, products, race
from node.runtime.engine.kernels.book import ObjectCode

log = logging.getLogger(__name__)
FAMILIES: Final[dict[str, Callable[..., Any]]] = {
    make.__name__: make
    for make in (
        *(attention.attend, attention.write),
        *(norms.rms_norm, norms.silu_gate, norms.gelu_tanh_gate, norms.turn),
        *(race.contenders, race.mass),
        *(products.product_bfloat16, products.product_int8, products.product_int4),
    )
}
_TYPES: Final = {kind.__name__: kind for kind in (np.float32, np.float64, np.uint16, np.int8)}
_WORDS: Final = {**_TYPES, "True": True, "False": False}


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
