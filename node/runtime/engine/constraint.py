"""What keeps an answer inside a grammar, as the engine sees it. Compiled grammars live outside; see `node.runtime.grammar`.

A constraint belongs to one sequence and moves with it, token by token. It holds no noise and no logits, so it can be made
again anywhere by feeding it the tokens that were delivered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Constraint(Protocol):
    """Rule 0 of the sampler: which tokens may follow."""

    def mask(self) -> Tensor | None:
        """Bool [n], on the CPU, true where a token is allowed; ids from n on are not. None allows every token.

        The constraint decides about end-of-sequence tokens as about any other: they are allowed where the answer may end, and
        nothing else is where it must. Valid until the next `accept`.
        """

    def accept(self, token: int) -> None:
        """The token that followed. Raises `ValueError` for one that was not allowed; the constraint is then of no use."""

    @property
    def ended(self) -> bool:
        """Nothing more may follow: an end-of-sequence token was accepted, or only one could be."""
