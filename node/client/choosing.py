"""Which worker a request goes to, and why not to the others.

Rules
- The choice is `protocol.selection`'s; here is what it is made from: the offers at hand, what the vaults hold, what was seen of
  each worker, and how long the prompt is.
- A prompt's length is exact where the model's tokenizer is at hand; else it is an upper bound, so that nothing is asked for that
  is not paid for.
- When nobody can serve, the error has every worker's reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from node.client.wallet import ClientWallet
from node.errors import ConfigError, InsufficientFunds, NoWorker
from node.network.discovery import OfferBook
from protocol.errors import InvalidValue
from protocol.ids import ModelId, PeerId
from protocol.messages import ChatMessage, Params
from protocol.offers import ModelOffer, VerifiedOffer
from protocol.selection import Candidate, Exclusion, History, Policy, Purse, Request, Selection, choose
from protocol.tasks import ChatRequest, EmbedRequest, RerankRequest, TaskRequest, shape_of, task_of

TokenCounter = Callable[[ModelId, Sequence[ChatMessage]], int | None]
"""Exact prompt length by the model's own tokenizer, or None where it is not at hand."""

TEMPLATE_TOKENS = 256
"""Allowance for what a chat template adds around the messages when we cannot count exactly."""
TOKENS_PER_MESSAGE = 16


class Choosing:
    """For one client."""

    def __init__(
        self,
        *,
        offers: OfferBook,
        wallet: ClientWallet,
        history: Mapping[PeerId, History],
        now_ms: Callable[[], int],
        counter: TokenCounter | None,
    ) -> None:
        """`history`: what was seen of each worker; whoever has seen something writes into it."""
        self._offers = offers
        self._wallet = wallet
        self._history = history
        self._now_ms = now_ms
        self.counter = counter

    def select(self, model: str, request: TaskRequest, params: Params, policy: Policy) -> list[Candidate]:
        """Workers for a request and what each would be paid with, best first. Raises `NoWorker` or `InsufficientFunds`."""
        return self._ranked(model, self.explain(model, request, params, policy))

    def takers(self, model: str, messages: tuple[ChatMessage, ...], params: Params, policy: Policy) -> list[Candidate]:
        """As `select`, whatever our vaults hold and whatever a chat may cost: for a batch job, which has limits of its own."""
        purses = [replace(purse, available=None, max_cost=None) for purse in self._wallet.purses()]
        return self._ranked(model, self.explain(model, ChatRequest(messages), params, policy, purses))

    def _ranked(self, model: str, selection: Selection) -> list[Candidate]:
        if selection.ranked:
            return list(selection.ranked)
        if (Exclusion.NO_FUNDS,) in selection.rejected.values():
            raise InsufficientFunds(
                f"the vaults hold too little for {model!r} with any worker, in every token that we pay with",
                hint="gristmill deposit AMOUNT",
            )
        reasons = {str(peer): tuple(r.value for r in why) for peer, why in selection.rejected.items()}
        raise NoWorker(
            f"no worker can serve {model!r}" + (f" ({len(reasons)} offers looked at)" if reasons else ": no offers"),
            reasons,
            hint=self._no_common_chain(selection)
            or "; ".join(f"{peer[-8:]}: {', '.join(why)}" for peer, why in list(reasons.items())[:4])
            or "name a worker with --worker MULTIADDR, or set p2p.bootstrap",
        )

    def _no_common_chain(self, selection: Selection) -> str:
        """What to do when some workers would serve us, but are paid where we have nothing; else empty."""
        others = {peer for peer, why in selection.rejected.items() if why == (Exclusion.NO_COMMON_CHAIN,)}
        if not others:
            return ""
        theirs = {p.chain_id for o in self._offers.current() if o.peer_id in others for p in o.document.accepts}
        ours = sorted({asset.chain_id for asset in self._wallet.means})
        return (
            f"no_common_chain: {len(others)} workers are paid on chain {_listed(sorted(theirs))}, we pay on {_listed(ours)}; "
            "configure one of theirs as a [chains.NAME], with a token of it in client.pay_with"
        )

    def explain(
        self,
        model: str,
        request: TaskRequest,
        params: Params,
        policy: Policy,
        purses: Sequence[Purse] | None = None,
    ) -> Selection:
        """The whole choice: ranks and scores, and why not, per worker."""
        offers = self._offers.current()
        model_id = self._model_id(model, offers)
        known = self._known(model_id, offers)
        units = self.input_units(known, request, params.max_tokens) if known else 0
        rows = 0 if known is None else shape_of(request, known.dimensions or 1).rows
        wanted = Request(model_id, units, params, task_of(request), rows)
        purses = self._wallet.purses() if purses is None else purses
        return choose(offers, wanted, purses, policy, self._history, self._now_ms())

    def input_units(self, model: ModelOffer, request: TaskRequest, max_tokens: int = 0) -> int:
        """The most input units that a request can be billed: exact for media, and for texts as `count_tokens` is for messages."""
        match request:
            case ChatRequest(messages=messages):
                return self.count_tokens(model, messages, max_tokens)
            case EmbedRequest(texts=texts):
                return sum(_text_tokens(model, text) for text in texts)
            case RerankRequest(query=query, documents=documents):
                return sum(_text_tokens(model, query) + _text_tokens(model, document) for document in documents)
            case _:
                return shape_of(request).most_units or 0

    def count_tokens(self, model: ModelOffer, messages: Sequence[ChatMessage], max_tokens: int = 0) -> int:
        """Prompt tokens: exact where the model's tokenizer is at hand, else an upper bound.

        The bound holds for byte-level tokenizers, where no text has more tokens than bytes; and no worker accepts a prompt
        that leaves less than `max_tokens` of the context.
        """
        return self.counted(model, messages, max_tokens)[0]

    def counted(self, model: ModelOffer, messages: Sequence[ChatMessage], max_tokens: int = 0) -> tuple[int, bool]:
        """As `count_tokens`, and whether it is exact."""
        exact = self.counter(ModelId(model.model_id), messages) if self.counter else None
        if exact is not None:
            return exact, True
        size = sum(len(m.content.encode()) + TOKENS_PER_MESSAGE for m in messages)
        return min(size + TEMPLATE_TOKENS, max(0, model.context_length - max_tokens)), False

    def known(self, model: str) -> ModelOffer | None:
        """What some worker says of a model, if any offers it."""
        offers = self._offers.current()
        return self._known(self._model_id(model, offers), offers)

    def _known(self, model_id: ModelId, offers: Sequence[VerifiedOffer]) -> ModelOffer | None:
        return next((m for o in offers if (m := o.document.model(model_id)) is not None), None)

    def model_id(self, model: str) -> ModelId:
        """Of a name or an id; all zero when nobody offers a model of that name. Raises `ConfigError` when it is ambiguous."""
        return self._model_id(model, self._offers.current())

    def _model_id(self, model: str, offers: Sequence[VerifiedOffer]) -> ModelId:
        try:
            return ModelId.from_cid(model)
        except InvalidValue:
            pass
        ids = {ModelId(m.model_id) for o in offers for m in o.document.models if m.name == model}
        if len(ids) > 1:
            listed = ", ".join(sorted(str(i) for i in ids))
            raise ConfigError(f"several models are called {model!r}", hint=f"name one by its id: {listed}")
        return ids.pop() if ids else ModelId(bytes(32))


def _text_tokens(model: ModelOffer, text: str) -> int:
    """No worker takes a text that is longer than the model's context, and none has more tokens than bytes."""
    return min(len(text.encode()) + TOKENS_PER_MESSAGE, model.context_length)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)
