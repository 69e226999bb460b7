"""Log probabilities of an answer's tokens, asked for by `Params.logprobs`: one row of numbers a token, and when a row is a lie.

Rules:

1. A figure is the natural logarithm of the model's own probability: softmax of its logits, before grammar, bias, penalties,
   temperature and filters. So it follows from model and tokens alone, and a stream that goes on elsewhere has no seam in it.
2. Rows travel in `Chunk.data`, in the chunk that brings their tokens, one for each token. There they are in the output digest.
3. A row has one width, by the number N that was asked for:

       row = logprob of the token as float32 || N times ( token id as uint32 || its logprob as float32 ), all little-endian

   with the N likeliest tokens, likeliest first, equals by id. -inf is a probability of 0.
4. No model can have computed NaN, +inf or a figure above 0, likeliest tokens out of order or one of them twice, two figures for
   one token, a token that is likelier than the likeliest, ids outside its vocabulary, probabilities of more than 1 together, or
   of less than 1 if all other tokens were as likely as the last of the likeliest. `fault` says so. Whoever takes rows from
   somebody else asks it before they are used; a wrong number of bytes is no row at all.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Final

from protocol.errors import InvalidValue

LOGPROBS_LIMIT: Final = 20
"""Likeliest tokens that may be asked for with each token."""
ID_LIMIT: Final = 1 << 32
"""No vocabulary is larger."""
_SLACK: Final = 1e-3
"""By which probabilities may add up to more than 1, or to less: each was rounded."""

Top = tuple[tuple[int, float], ...]
"""(token id, logprob) of the likeliest tokens, likeliest first."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token of an answer, and what else might have stood there."""

    token_id: int
    logprob: float
    """At most 0."""
    top: Top


def row_bytes(count: int) -> int:
    """Width of a row with the `count` likeliest tokens."""
    return _row(count).size


def pack(logprob: float, top: Top) -> bytes:
    """One row. Raises `InvalidValue` for what does not fit into it; whether it can be true is `fault`'s question."""
    try:
        return _row(len(top)).pack(logprob, *(part for pair in top for part in pair))
    except (struct.error, OverflowError) as error:
        raise InvalidValue(f"no row of log probabilities: {error}") from None


def unpack(token_ids: Sequence[int], data: bytes) -> Iterator[TokenLogprobs]:
    """Rows of `check`ed bytes, with the tokens that they are about; nothing where there are no bytes."""
    if not data:
        return
    width = len(data) // len(token_ids)
    for token, (logprob, *rest) in zip(token_ids, _row((width - 4) // 8).iter_unpack(data), strict=True):
        yield TokenLogprobs(token, logprob, tuple(zip(rest[::2], rest[1::2], strict=True)))


def check(token_ids: Sequence[int], data: bytes, count: int | None, vocabulary: int = ID_LIMIT) -> None:
    """That `data` is one possible row for each of these tokens, with the `count` likeliest each; None: no rows were asked for.

    `vocabulary`: ids from here on are none of the model's. Raises `InvalidValue`.
    """
    if count is None:
        if data:
            raise InvalidValue("numbers where text was asked for")
        return
    wanted = len(token_ids) * row_bytes(count)
    if len(data) != wanted:
        raise InvalidValue(
            f"{len(data)} bytes of log probabilities for {len(token_ids)} tokens with {count} likeliest each, not {wanted}"
        )
    for one in unpack(token_ids, data):
        wrong = fault(one.token_id, one.logprob, one.top, count, vocabulary)
        if wrong:
            raise InvalidValue(wrong)


def fault(token: int, logprob: float | None, top: Top, count: int, vocabulary: int = ID_LIMIT) -> str:
    """What is wrong with one token's figures, in words; empty when a model may have computed them."""
    if logprob is None or len(top) != count:
        return f"{len(top)} likeliest tokens where {count} were asked for"
    ids, figures = [one for one, _ in top], [figure for _, figure in top]
    if not (0 <= token < vocabulary and all(0 <= one < vocabulary for one in ids)):
        return "a token outside the vocabulary"
    if not all(figure <= 0 for figure in (logprob, *figures)):  # NaN is not either
        return "a log probability that is not a number of 0 or less"
    if any(after > before for before, after in pairwise(figures)):
        return "likeliest tokens that are not in order"
    if len(set(ids)) != count:
        return "a token that is among the likeliest twice"
    if token in ids:
        if figures[ids.index(token)] != logprob:
            return "two log probabilities for one token"
    elif figures and logprob > figures[-1]:
        return "a token that is likelier than the likeliest"
    told = math.fsum(map(math.exp, figures))
    if told + (0.0 if token in ids else math.exp(logprob)) > 1 + _SLACK:
        return "probabilities of more than 1 together"
    if figures and told + (vocabulary - count) * math.exp(figures[-1]) < 1 - _SLACK:
        return "probabilities of less than 1, were all others as likely as the last that is told"
    return ""


@cache
def _row(count: int) -> struct.Struct:
    if not 0 <= count <= LOGPROBS_LIMIT:
        raise InvalidValue(f"from 0 to {LOGPROBS_LIMIT} likeliest tokens can be asked for, not {count}")
    return struct.Struct("<f" + "If" * count)
