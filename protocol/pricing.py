"""What a job costs: integers only, one rounding, the same function on both sides."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from protocol.errors import InvalidValue

PER: Final = 1_000_000
"""Token prices are per this many tokens."""
PRICE_MAX: Final = 2**63 - 1
TOKENS_MAX: Final = 2**32 - 1

_Unit = Annotated[int, msgspec.Meta(ge=0, le=PRICE_MAX)]


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prices in the smallest unit of the channel's token."""

    request: _Unit = 0
    """Per job, once it is accepted."""
    input: _Unit = 0
    """Per 1,000,000 prompt tokens."""
    output: _Unit = 0
    """Per 1,000,000 generated tokens."""


def cost(price: Price, input_tokens: int, output_tokens: int) -> int:
    """Cost of one part of a job, rounded up once to a whole smallest unit. Never decreases in either count."""
    return batch_cost(price, 1, input_tokens, output_tokens)


def batch_cost(price: Price, requests: int, input_tokens: int, output_tokens: int) -> int:
    """Cost of so many requests with so many tokens in all, rounded up once. Never decreases in any count."""
    for count in (requests, input_tokens, output_tokens):
        if not 0 <= count <= TOKENS_MAX:
            raise InvalidValue(f"count {count} is outside 0..{TOKENS_MAX}")
    scaled = price.input * input_tokens + price.output * output_tokens
    return price.request * requests + -(-scaled // PER)
