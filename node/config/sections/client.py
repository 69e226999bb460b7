"""`[client]`: what it is ready to pay, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass

from node.config.bounds import AMOUNT_MAX, DEFAULT, DELAY_MAX, DELAY_MIN, short_name
from node.settings import each, setting


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """The client: what it is ready to pay and how long it waits. Amounts are in the default token."""

    pay_with: tuple[str, ...] = setting(
        (DEFAULT,),
        "Tokens to pay with, the preferred one first: names of `[tokens.NAME]`, and `default`. Tokens of a known rate are "
        "compared by it; the others are taken in this order.",
        check=each(short_name),
        values="names",
    )
    allocation: int = setting(
        1_000_000,
        "Amount locked for a worker when a channel to it opens.",
        unit="smallest unit",
        low=1,
        high=AMOUNT_MAX,
    )
    day_limit: int = setting(
        100,
        "Of each token, how much may be locked, and how much may be paid, on one day (UTC): so many times its allocation. The "
        "signer refuses more. 0 means no limit.",
        unit="allocations",
        low=0,
        high=1_000_000,
    )
    slash_min: int = setting(
        1,
        "A worker's penalty is moved by itself, a week after it was booked, when our share is at least this. 0: by hand alone "
        "(`gristmill slash move`).",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    withdraw_delay_s: int = setting(3600, "Withdraw delay of our channels.", unit="s", low=DELAY_MIN, high=DELAY_MAX)
    max_cost: int = setting(
        0, "Most that one job may cost; 0 means no limit.", unit="smallest unit", low=0, high=AMOUNT_MAX
    )
    max_price_request: int = setting(
        0, "Highest price per job that we accept; 0 means no limit.", unit="smallest unit", low=0, high=AMOUNT_MAX
    )
    max_price_input: int = setting(
        0,
        "Highest price of prompt tokens that we accept; 0 means no limit.",
        unit="smallest unit per 1,000,000 tokens",
        low=0,
        high=AMOUNT_MAX,
    )
    max_price_output: int = setting(
        0,
        "Highest price of generated tokens that we accept; 0 means no limit.",
        unit="smallest unit per 1,000,000 tokens",
        low=0,
        high=AMOUNT_MAX,
    )
    deadline_ms: int = setting(120_000, "A job must have ended after this time.", unit="ms", low=1, high=86_400_000)
    first_token_ms: int = setting(
        30_000, "A worker that has sent no token after this time is given up.", unit="ms", low=1, high=86_400_000
    )
    stall_ms: int = setting(
        15_000, "A stream that stands still this long is given up.", unit="ms", low=1, high=86_400_000
    )
