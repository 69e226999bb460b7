"""What a replica says, held to what it may say: a replica that lies is lost, and its streams go on at another.

The cluster is the operator's own and its processes run our code, so this is no wall (Ray unpickles whatever comes, see
`ray_cluster`). It is there for a node with another version, a library that computes nonsense, or memory that fails: none of them
may end the worker, sell what is no answer, or fill the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec

from node.runtime.backends.ray_replica import BUSY, Batch
from protocol.errors import InvalidValue
from protocol.logprobs import check
from protocol.messages import FinishReason
from protocol.tame import one_line

EMPTY: Final = 64
"""Batches with nothing in them, one after the other."""
_ENDS: Final = {0, int(FinishReason.STOP), int(FinishReason.LENGTH)}
_Meta = msgspec.Meta
_Word = Annotated[str, _Meta(max_length=200)]
_Token = Annotated[int, _Meta(ge=0, le=2**31 - 1)]
_Count = Annotated[int, _Meta(ge=1, le=1 << 30)]
_Batch = tuple[tuple[_Token, ...], int, str, bytes]


class Nonsense(Exception):
    """It said what no replica says."""


class _Model(msgspec.Struct, forbid_unknown_fields=True):
    name: _Word
    context_length: _Count
    dtype: _Word
    numerics_class: _Word
    params: Annotated[tuple[_Word, ...], _Meta(max_length=64)]
    largest: _Count


class _Told(msgspec.Struct, forbid_unknown_fields=True):
    version: _Word
    models: dict[_Word, _Model]


def told(raw: Any, models: Sequence[str]) -> dict[str, Any]:
    """`Replica.describe`, for these models and no others. Raises `Nonsense`."""
    try:
        found = msgspec.convert(raw, _Told, strict=True)
    except (msgspec.ValidationError, TypeError) as error:
        raise Nonsense(f"what it says of itself is nonsense: {one_line(str(error))[:200]}") from None
    if set(found.models) != set(models):
        raise Nonsense("it serves other models than it was asked to")
    plain: dict[str, Any] = msgspec.to_builtins(found)
    for model in plain["models"].values():
        model["params"] = tuple(model["params"])
    return plain


class Listener:
    """The batches of one stream that may have `left` more tokens, each with the log probabilities of the `likeliest`."""

    def __init__(self, left: int, likeliest: int | None = None) -> None:
        self._left, self._likeliest, self._empty, self._over = left, likeliest, 0, False

    def __call__(self, raw: Any) -> Batch:
        """A batch that may be one. Raises `Nonsense`."""
        try:
            ids, finish, fault, rows = msgspec.convert(raw, _Batch, strict=True)
        except (msgspec.ValidationError, TypeError) as error:
            raise Nonsense(f"its batch is none: {one_line(str(error))[:200]}") from None
        self._left -= len(ids)
        self._empty = 0 if ids else self._empty + 1
        ended = bool(finish or fault)
        if self._over or finish not in _ENDS or (finish and fault) or self._left < 0 or self._empty > EMPTY:
            raise Nonsense("its stream does not end where a stream ends")
        if (finish == FinishReason.LENGTH) != (self._left == 0 and finish != FinishReason.STOP and not fault):
            raise Nonsense("it ends a stream at another length than was asked for")
        try:
            check(ids, rows, self._likeliest)
        except InvalidValue as error:
            raise Nonsense(str(error)[:200]) from None
        self._over = ended
        return ids, finish, fault if fault == BUSY else one_line(fault)[:300], rows
