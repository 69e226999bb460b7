"""`[worker]`: what it serves, for how much, and how far it trusts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from node.config.bounds import AMOUNT_MAX, DEFAULT, DELAY_MAX, DELAY_MIN, VALUE_MAX, short_name
from node.settings import account, each, setting, task_price

COMMITTEE: Final = "committee"
"""What the deployment's committee is called where a resolver is named."""


def _resolver(value: str) -> str:
    return value if value == COMMITTEE else account(value)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The worker: what it serves, for how much, and how far it trusts. Amounts are in the default token."""

    models: tuple[str, ...] = setting((), "Names or ids of the models to serve; empty means all in the model store.")
    accept: tuple[str, ...] = setting(
        (DEFAULT,),
        "Tokens that the worker is paid in: names of `[tokens.NAME]`, and `default`.",
        check=each(short_name),
        values="names",
    )
    price_request: int = setting(0, "Price of one accepted job.", unit="smallest unit", low=0, high=AMOUNT_MAX)
    price_input: int = setting(
        100_000, "Price of prompt tokens.", unit="smallest unit per 1,000,000 tokens", low=0, high=AMOUNT_MAX
    )
    price_output: int = setting(
        400_000, "Price of generated tokens.", unit="smallest unit per 1,000,000 tokens", low=0, high=AMOUNT_MAX
    )
    task_prices: tuple[str, ...] = setting(
        (),
        "Prices of tasks other than chat, per job and per 1,000,000 units of input and of output: tokens and vectors (`embed`), "
        "tokens and scores (`rerank`), 10 ms of audio and tokens (`transcribe`), tiles of 256 x 256 pixels and characters "
        "(`ocr`). A task that is not named has the prices of a chat.",
        check=each(task_price),
        values="TASK=REQUEST/INPUT/OUTPUT",
    )
    tick_tokens: int = setting(
        64, "Payment falls due at least every so many generated tokens.", unit="tokens", low=1, high=65_536
    )
    tick_ms: int = setting(
        2000,
        "Payment falls due at least this often: a client that knows our speed pays ahead for so long, 8 tokens at least.",
        unit="ms",
        low=10,
        high=60_000,
    )
    credit_ticks: int = setting(
        1, "How many ticks of one stream may be unpaid before it pauses.", unit="ticks", low=1, high=1000
    )
    global_credit: int = setting(
        100_000,
        "Most that may be unpaid over all channels together: else a thousand identities with one tick each are free compute.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    max_streams: int = setting(4, "Jobs that run at once.", unit="streams", low=1, high=4096)
    offer_ttl_s: int = setting(60, "How long a signed offer stands.", unit="s", low=1, high=3600)
    coalesce_ms: int = setting(
        15, "Tokens that come within this time travel in one chunk.", unit="ms", low=0, high=1000
    )
    min_withdraw_delay_s: int = setting(
        DELAY_MIN,
        "Channels that can be emptied faster than this are refused.",
        unit="s",
        low=DELAY_MIN,
        high=DELAY_MAX,
    )
    claim_min: int = setting(
        100_000, "Claim a channel when this much has accrued.", unit="smallest unit", low=0, high=AMOUNT_MAX
    )
    coin_value: int = setting(
        0,
        "What one whole coin of the chain, with which gas is paid, is worth in this token: with it claims are weighed against "
        "their gas. 0: they are not, and `worker.claim_min` alone decides.",
        unit="smallest unit",
        low=0,
        high=VALUE_MAX,
    )
    claim_gain_percent: int = setting(
        1000,
        "How much a claim must be worth, in percent of its gas, as long as neither a leaving client nor the age of the money "
        "forces it. Only where the coin's value is set.",
        unit="%",
        low=100,
        high=1_000_000,
    )
    claim_at_loss: bool = setting(
        False,
        "Claim money that would be lost otherwise even when its gas costs more than it is worth. Whoever leaves many crumbs can "
        "make such a worker burn gas.",
    )
    claim_every_s: int = setting(
        300,
        "How often accrued vouchers are looked at for a claim; more often where a withdraw delay is short.",
        unit="s",
        low=1,
        high=604_800,
    )
    stall_ms: int = setting(
        10_000, "How long a stream waits for an overdue voucher before it ends unpaid.", unit="ms", low=10, high=600_000
    )
    batch_min: int = setting(
        1_000,
        "The least that a batch job must be able to bring: what its two or three transactions are worth. A cancelled "
        "job goes on until it has brought as much. 0: no batch jobs.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    batch_penalty: int = setting(
        0,
        "The most of the owner's stake that answers for one batch job; clients may ask for that much.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    batch_streams: int = setting(
        2,
        "Inputs of batch jobs that are computed at once, in places that no stream uses.",
        unit="streams",
        low=1,
        high=4096,
    )
    batch_share: int = setting(
        10,
        "The part of the time in which one input of a batch job goes on although live streams run. 0: batch jobs wait for quiet "
        "times, or for their deadlines.",
        unit="percent",
        low=0,
        high=100,
    )
    batch_jobs: int = setting(16, "Batch jobs that are open at once.", unit="jobs", low=1, high=1024)
    batch_resolvers: tuple[str, ...] = setting(
        (),
        "Contracts that may judge disputes about our batch jobs: addresses, or `committee` for that of the deployment. Empty: "
        "none, and a submission is paid when its window ends.",
        check=each(_resolver),
        values="addresses or `committee`",
    )
    payout: str = setting(
        "",
        "Account that earnings should go to; `start` warns when the chain has another one. `gristmill payout set` changes that.",
        check=account,
        values="an address",
    )
