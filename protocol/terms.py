"""What both sides of a job must agree on before anything flows, and what follows from it: limits, ticks, costs.

Each derives it from the ask, the offer and the channel; nothing of it is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.digest import OutputDigest
from protocol.ids import Address, ChannelId, Hash32, JobId, ModelId
from protocol.messages import AskMessage, Params, params_hash, request_hash
from protocol.payment import LEAST_TICK
from protocol.pricing import Price, cost
from protocol.tasks import CHAT_SHAPE, Shape
from protocol.typed_data import Ask, Domain


@dataclass(frozen=True, slots=True)
class Terms:
    """What both sides must agree on before a token flows. Each derives it from the ask, the offer and the channel."""

    domain: Domain
    ask: Ask
    params: Params
    price: Price
    input_limit: int
    """The most input units that are billed, with all that may still come. Of texts: at the client the most tokens that it
    believes in, at the worker the count itself."""
    receiver_authorizer: Address
    """Signs the receipt."""
    payer_authorizer: Address
    """Signs vouchers."""
    tick_tokens: int
    credit_tokens: int
    """Output tokens beyond vouchers: the worker's exposure."""
    shape: Shape = CHAT_SHAPE

    @property
    def limit(self) -> int:
        """The most this part can cost."""
        return cost(self.price, self.input_limit, self.output_limit)

    @property
    def asked_units(self) -> int:
        """Input units of what comes with the ask: those of media, or else as `input_limit`."""
        return self.input_limit if self.shape.units is None else self.shape.units

    @property
    def output_limit(self) -> int:
        """The most output units: tokens, or rows of numbers."""
        return self.shape.rows or self.params.max_tokens

    def spent(self, input_tokens: int, output_tokens: int) -> int:
        return cost(self.price, input_tokens, output_tokens)

    def produced(self, digest: OutputDigest) -> int:
        """Output units of what was delivered."""
        return digest.size // self.shape.row_bytes if self.shape.rows else digest.count

    @property
    def tick(self) -> int:
        """Cost of one tick: what one side may be ahead of the other. A tick of output, or where input is billed as it comes, of
        whichever is dearer."""
        return self._ahead(self.tick_tokens)

    @property
    def least_tick(self) -> int:
        """Cost of the smallest tick that a client may pay by."""
        return self._ahead(min(self.tick_tokens, LEAST_TICK))

    @property
    def credit(self) -> int:
        return self._ahead(self.credit_tokens)

    def _ahead(self, units: int) -> int:
        growing = self.shape.units != self.shape.most_units
        dearer = max(self.price.output, self.price.input if growing else 0)
        return cost(Price(output=dearer), 0, units)


def ask_struct(message: AskMessage) -> Ask:
    """The signed struct of an ask, with the hashes recomputed from its content."""
    return Ask(
        job_id=JobId(message.job_id),
        part=message.part,
        channel_id=ChannelId(message.channel_id),
        worker=Address(message.worker),
        model_id=ModelId(message.model_id),
        request_hash=request_hash(message.request, message.resume),
        params_hash=params_hash(message.params),
        offer_hash=Hash32(message.offer_hash),
        deadline=message.deadline,
    )
