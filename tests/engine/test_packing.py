"""The formulas of `node.runtime.packing` against the layers that they are of, over shapes that fit no kernel's blocks."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

from node.runtime.engine.linear import FORMATS, make_linear  # noqa: E402
from node.runtime.packing import Packing  # noqa: E402

SHAPES = [(64, 64), (97, 48), (160, 48), (16, 32), (48, 160), (99, 33), (576, 1536), (3072, 576), (1000, 96)]


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_layer_weighs_what_its_formula_says(fmt: str) -> None:
    draw = random.Random(3)
    shapes = SHAPES + [(draw.randrange(2, 300), draw.randrange(2, 300)) for _ in range(12)]
    for out, inputs in shapes:
        weight, added = torch.randn(out, inputs), torch.randn(out)
        for bias, head, few in [(False, False, True), (True, False, True), (True, True, True), (True, True, False)]:
            layer = make_linear(weight, fmt, added if bias else None, head=head, few_rows=few)
            expected = Packing(fmt, few_rows=few).linear(out, inputs, bias=bias, head=head)
            assert expected == layer.nbytes, (out, inputs, bias, head, few, type(layer).__name__)
