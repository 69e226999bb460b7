"""Does this worker take this job? Pure: everything the answer depends on is an argument.

Two steps, cheap before dear: `check_ask` needs no tokenizer, so a stranger cannot make us tokenise for nothing;
`check_prompt` then knows the prompt's length. A no is a `Rejected` with one reason of the closed set; the driver signs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from protocol.channel import ChannelState
from protocol.errors import GristmillError, InvalidValue, RefusalReason, RemoteProtocolError
from protocol.ids import Address, Hash32, ModelId
from protocol.job import Terms, ask_struct
from protocol.keys import require_signer
from protocol.messages import AskMessage, amount_from_wire, sampling_params
from protocol.offers import Asset, ModelOffer, Payment, VerifiedOffer
from protocol.payment import exposure, unsecured
from protocol.pricing import Price
from protocol.selection import Request, changed_params, honoured
from protocol.tasks import CHAT_SHAPE, UNITS, Shape, Task, shape_of, task_of
from protocol.typed_data import Voucher

DEADLINE_MAX_MS: Final = 24 * 3_600_000
"""Results are kept this long, so an ask that is sent again within its deadline finds its result, and never a second bill."""


class Rejected(GristmillError):
    """The answer is no."""

    def __init__(self, reason: RefusalReason, detail: str = "") -> None:
        super().__init__(f"{reason.code}: {detail}" if detail else reason.code)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the worker is, and how it sees the chain, for one channel."""

    free_slots: int
    draining: bool
    credit_in_use: int
    """The most that all other channels in this channel's asset may come to owe, smallest unit: see `payment.exposure`."""
    credit_limit: int
    """The most of it that the operator risks; 0 = no limit. Each asset has its own."""
    chain_age_ms: int
    """Since the channel's chain was last seen."""
    chain_age_limit_ms: int


@dataclass(frozen=True, slots=True)
class Checked:
    """An ask that is sound as far as that can be told without tokenising."""

    ask: AskMessage
    offer: VerifiedOffer
    model: ModelOffer
    payment: Payment
    price: Price
    """Of the model, in the channel's asset."""
    channel: ChannelState
    cumulative: int
    shape: Shape = CHAT_SHAPE


def check_ask(
    ask: AskMessage,
    *,
    worker: Address,
    offers: Mapping[Hash32, VerifiedOffer],
    channel: ChannelState | None,
    load: Load,
    now_ms: int,
) -> Checked:
    """Everything but the prompt's length. Raises `Rejected`."""
    if load.draining:
        raise Rejected(RefusalReason.DRAINING)
    if ask.worker != worker:
        raise Rejected(RefusalReason.WRONG_WORKER, f"asked of {Address(ask.worker)}")
    offer = offers.get(Hash32(ask.offer_hash))
    if offer is None:
        raise Rejected(RefusalReason.OFFER_UNKNOWN, "not an offer of this worker, or long gone")
    if not offer.valid_at(now_ms):
        raise Rejected(RefusalReason.OFFER_EXPIRED)
    model = offer.document.model(ask.model_id)
    if model is None:
        raise Rejected(RefusalReason.MODEL_UNKNOWN)
    shape = _shape(ask, model)
    refused = sorted(set(changed_params(ask.params)) - honoured(model, shape.task))
    if refused:
        raise Rejected(RefusalReason.UNSUPPORTED_PARAM, ", ".join(refused))
    try:
        sampling_params(ask.params)
    except InvalidValue as error:
        raise Rejected(RefusalReason.UNSUPPORTED_PARAM, str(error)[:200]) from None
    if not shape.rows and ask.params.max_tokens > model.max_tokens:
        raise Rejected(RefusalReason.MAX_TOKENS_EXCEEDED, f"at most {model.max_tokens}")
    if not now_ms < ask.deadline <= now_ms + DEADLINE_MAX_MS:
        raise Rejected(RefusalReason.DEADLINE_INVALID, "a deadline lies in the next 24 hours")
    checked = _check_channel(ask, offer, model, channel, shape)
    if load.chain_age_ms > load.chain_age_limit_ms:
        raise Rejected(RefusalReason.CHAIN_STALE, f"the chain was last seen {load.chain_age_ms // 1000} s ago")
    if load.free_slots <= 0:
        raise Rejected(RefusalReason.BUSY)
    return checked


def _shape(ask: AskMessage, model: ModelOffer) -> Shape:
    """What is asked for, if this model does that."""
    task = task_of(ask.request)
    if task not in model.tasks:
        raise Rejected(RefusalReason.TASK_UNSUPPORTED, f"{task.value} of a model that does {', '.join(model.tasks)}")
    if ask.resume and task is not Task.CHAT:
        raise Rejected(RefusalReason.INPUT_INVALID, "only a chat goes on where another worker ended")
    try:
        return shape_of(ask.request, model.dimensions)
    except InvalidValue as error:
        raise Rejected(RefusalReason.INPUT_INVALID, str(error)[:200]) from None


def _check_channel(
    ask: AskMessage,
    offer: VerifiedOffer,
    model: ModelOffer,
    channel: ChannelState | None,
    shape: Shape,
) -> Checked:
    if channel is None:
        raise Rejected(RefusalReason.CHANNEL_UNKNOWN, "open it first")
    if channel.leaving:
        raise Rejected(RefusalReason.CHANNEL_CLOSING)
    domain = channel.domain
    position = None if domain is None else offer.document.position(Asset.of(domain, channel.config.token))
    if domain is None or position is None:
        raise Rejected(RefusalReason.WRONG_DOMAIN, "the offer takes no payment in the channel's token on its chain")
    signer = channel.config.payer_authorizer
    try:
        require_signer(ask_struct(ask).digest(domain), ask.signature, signer, "ask")
    except RemoteProtocolError as error:
        raise Rejected(RefusalReason.SIGNER_MISMATCH, error.detail[:200]) from None
    cumulative = amount_from_wire(ask.cumulative)
    try:
        voucher = Voucher(channel.channel_id, cumulative)
        require_signer(voucher.digest(domain), ask.voucher_signature, signer, "voucher")
    except RemoteProtocolError as error:
        raise Rejected(RefusalReason.VOUCHER_INVALID, error.detail[:200]) from None
    return Checked(
        ask, offer, model, offer.document.accepts[position], model.prices[position], channel, cumulative, shape
    )


def check_prompt(checked: Checked, input_tokens: int, *, running: int, load: Load) -> Terms:
    """The rest, once the prompt is tokenised. `running`: cost so far of the channel's other parts under way.

    Judges the channel as it is now, not as it was before the prompt was tokenised: the journal must take what is accepted here.
    Raises `Rejected`. The terms it returns are what the client must arrive at as well.
    """
    ask, model, channel, document = checked.ask, checked.model, checked.channel, checked.offer.document
    shape = checked.shape
    most_input = input_tokens if shape.most_units is None else shape.most_units
    if not Request(ModelId(ask.model_id), most_input, ask.params, shape.task, shape.rows).fits(model.context_length):
        what = f"{input_tokens} prompt tokens and {ask.params.max_tokens} to generate"
        if shape.task is not Task.CHAT:
            what = f"{most_input} of {UNITS[shape.task].input}"
        raise Rejected(RefusalReason.CONTEXT_EXCEEDED, f"{what}, context {model.context_length}")
    if channel.leaving:
        raise Rejected(RefusalReason.CHANNEL_CLOSING)
    if checked.cumulative > channel.allocated:
        raise Rejected(
            RefusalReason.ALLOCATION_INSUFFICIENT, f"voucher of {checked.cumulative}, {channel.allocated} allocated"
        )
    terms = Terms(
        domain=channel.home,
        ask=ask_struct(ask),
        params=ask.params,
        price=checked.price,
        input_limit=most_input,
        receiver_authorizer=channel.config.receiver_authorizer,
        payer_authorizer=channel.config.payer_authorizer,
        tick_tokens=document.tick_tokens,
        credit_tokens=document.credit_tokens,
        shape=shape,
    )
    if terms.limit > channel.free:
        raise Rejected(
            RefusalReason.ALLOCATION_INSUFFICIENT, f"up to {terms.limit} needed, {channel.free} free on the channel"
        )
    paid = replace(channel, cumulative=max(checked.cumulative, channel.cumulative))
    due = unsecured(paid, running + terms.spent(input_tokens, 0))
    if due > terms.credit:
        raise Rejected(RefusalReason.VOUCHER_INSUFFICIENT, f"{due} more due than covered, credit {terms.credit}")
    key = (terms.ask.job_id, terms.ask.part)
    risk = exposure(replace(paid, open_jobs={**paid.open_jobs, key: terms.limit}), terms.credit)
    if load.credit_limit and risk and load.credit_in_use + risk > load.credit_limit:
        raise Rejected(RefusalReason.CREDIT_EXHAUSTED, "unpaid work is at the operator's limit")
    return terms
