"""`[tokens.NAME]`: a further token, and every amount in it."""

from __future__ import annotations

from dataclasses import dataclass

from node.config.bounds import AMOUNT_MAX, DEFAULT, VALUE_MAX, short_name
from node.settings import account, each, ratio, setting, task_price


@dataclass(frozen=True, slots=True)
class TokenConfig:
    """A further token, to be paid in (`worker.accept`) or to pay with (`client.pay_with`). What `[worker]` and `[client]` say in
    smallest units holds for the default token alone; each further one has amounts of its own."""

    chain: str = setting(
        DEFAULT,
        "Name of the chain it is on: that of a `[chains.NAME]`, or `default`.",
        check=short_name,
        values="a name",
    )
    address: str = setting(
        "",
        "Its address; the zero address is the chain's own coin. Empty means the token that the chain's deployment names.",
        check=account,
        values="an address",
    )
    price_request: int = setting(0, "Worker: price of one accepted job.", unit="smallest unit", low=0, high=AMOUNT_MAX)
    price_input: int = setting(
        0, "Worker: price of prompt tokens.", unit="smallest unit per 1,000,000 tokens", low=0, high=AMOUNT_MAX
    )
    price_output: int = setting(
        0, "Worker: price of generated tokens.", unit="smallest unit per 1,000,000 tokens", low=0, high=AMOUNT_MAX
    )
    task_prices: tuple[str, ...] = setting(
        (),
        "Worker: as `worker.task_prices`, in this token.",
        check=each(task_price),
        values="TASK=REQUEST/INPUT/OUTPUT",
    )
    global_credit: int = setting(
        0,
        "Worker: most that may be unpaid over all channels in this token together. Needed where the token is accepted.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    claim_min: int = setting(
        0,
        "Worker: claim a channel when this much has accrued; also the least that an allocation must add. Needed where the token "
        "is accepted.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    coin_value: int = setting(
        0,
        "Worker: what one whole coin of the chain, with which gas is paid, is worth in this token: with it claims are weighed "
        "against their gas. 0: they are not. The chain's own coin is worth itself.",
        unit="smallest unit",
        low=0,
        high=VALUE_MAX,
    )
    batch_min: int = setting(
        0,
        "Worker: the least that a batch job in this token must be able to bring; 0: no batch jobs in it.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    batch_penalty: int = setting(
        0,
        "Worker: the most of the owner's stake in this token that answers for one batch job.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    allocation: int = setting(
        0,
        "Client: amount locked for a worker when a channel to it opens. Needed where the token is paid with.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    rate: str = setting(
        "",
        "Client: how many smallest units of the default token one smallest unit of this is worth, as a decimal number or a "
        "fraction such as 1/1000000000000. With it prices in the two are compared. Empty: they are not, and `client.pay_with` "
        "decides.",
        check=ratio,
        values="a number or a fraction above 0",
    )
    max_cost: int = setting(
        0, "Client: most that one job may cost; 0 means no limit.", unit="smallest unit", low=0, high=AMOUNT_MAX
    )
    max_price_request: int = setting(
        0,
        "Client: highest price per job that we accept; 0 means no limit.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    max_price_input: int = setting(
        0,
        "Client: highest price of prompt tokens that we accept; 0 means no limit.",
        unit="smallest unit per 1,000,000 tokens",
        low=0,
        high=AMOUNT_MAX,
    )
    max_price_output: int = setting(
        0,
        "Client: highest price of generated tokens that we accept; 0 means no limit.",
        unit="smallest unit per 1,000,000 tokens",
        low=0,
        high=AMOUNT_MAX,
    )
