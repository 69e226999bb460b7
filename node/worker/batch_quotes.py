"""Quotes for batch jobs: what a specification would cost here, and whether this worker takes it at all.

Rules
- A quote binds: whoever holds it can open the job on chain, whatever happens to us. So it is on disk, with its specification,
  before it is signed, and it stands for two minutes only.
- Anybody may ask, so what asking costs us is bounded: bytes and prompts are checked before they are tokenised; one tokenises at a
  time; characters per peer and in all are counted; quotes held are few per peer and few in all, and they expire.
- The prompts are tokenised here once, so the amount is exact where it can be: only the output is unknown.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec
import trio

from node.errors import ModelError, PromptInvalid
from node.ports import Backend
from node.store.batch_keeper import ChainClock, JobsChain
from node.store.errors import ResultsFull
from node.store.results import Results
from node.worker.allowance import Allowance, Limits
from node.worker.desk import Speed
from protocol.admission import Rejected
from protocol.errors import RefusalReason
from protocol.escrow.jobs import MAX_DURATION, MAX_WINDOW, MIN_WINDOW
from protocol.ids import ZERO_ADDRESS, Address, Hash32, JobId, ModelId, PeerId, keccak256
from protocol.messages import QuoteMessage, QuoteWire, RequestQuote, amount_from_wire, quote_from_wire, quote_to_wire
from protocol.pricing import Price
from protocol.selection import changed_params
from protocol.typed_data import Domain, Quote
from protocol.workload import BatchSpec, Terms, content_hash, decode_spec, decode_terms, encode_terms, terms_hash

log = logging.getLogger(__name__)
HELD_MOST: Final = 64
"""Quotes held at once."""
HELD_EACH: Final = 4
"""Of them for one peer."""
HELD_BYTES: Final = 48 << 20
"""Bytes of their specifications."""


@dataclass(frozen=True, slots=True)
class BatchAsset:
    """What batch jobs are paid in, and for how much. Amounts are in its smallest unit."""

    price: Price
    min_amount: int = 1
    """A job that cannot bring so much is not worth its transactions."""
    max_penalty: int = 0
    """The most of the owner's stake that answers for one job."""


@dataclass(frozen=True, slots=True)
class QuoteRules:
    resolvers: frozenset[Address] = frozenset({ZERO_ADDRESS})
    """Who may judge our disputes."""
    max_window: int = MAX_WINDOW
    max_duration: int = MAX_DURATION - 3600
    max_tokens: int = 65_536
    """For one input."""
    max_jobs: int = 16
    """Open at once."""
    valid_s: int = 120
    margin_s: int = 120
    """Before the deadline by which a job must be done."""
    min_duration: int = 180
    open_s: int = 30
    """A quote stands at least so long: the order has to come, and the transaction that opens the job to be mined."""
    characters: Limits = field(
        default_factory=lambda: Limits(32 << 20, 3600, 128 << 20, 3600, "characters to be tokenised")
    )


class HeldQuote(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A quote on disk."""

    peer: str
    chain_id: int
    contract: bytes
    quote: QuoteWire
    terms: bytes
    spec: bytes

    @property
    def domain(self) -> Domain:
        return Domain(self.chain_id, Address(self.contract))


@dataclass(frozen=True, slots=True)
class _Held:
    """A quote in memory: without its bulk."""

    peer: PeerId
    valid_before: int
    size: int
    room: int


def spec_key(job_id: JobId) -> Hash32:
    """Under which name a quote and its specification are kept."""
    return Hash32(keccak256(b"gristmill batch spec" + job_id))


class QuoteDesk:
    def __init__(
        self,
        *,
        worker: Address,
        rules: QuoteRules,
        assets: Mapping[tuple[Domain, Address], BatchAsset],
        chains: Mapping[Domain, JobsChain],
        backend: Backend,
        speeds: Mapping[ModelId, Speed],
        results: Results,
        now_ms: Callable[[], int],
        random16: Callable[[], bytes],
        backlog: Callable[[], tuple[int, float, int]],
    ) -> None:
        """`assets`: by Jobs contract and token. `backlog`: open jobs, seconds of work they still mean, bytes that their results
        will take."""
        self.rules = rules
        self.assets = assets
        self._worker = worker
        self._chains = chains
        self._backend = backend
        self._speeds = speeds
        self._results = results
        self._now_ms = now_ms
        self._random16 = random16
        self._backlog = backlog
        self._held: dict[JobId, _Held] = {}
        self._asking: set[PeerId] = set()
        self._tokenising = trio.CapacityLimiter(1)
        self._characters = Allowance(rules.characters)

    async def quote(self, peer: PeerId, asked: RequestQuote) -> tuple[Quote, Terms, Domain]:
        """The quote, on disk and still to be signed. Raises `Rejected` or `RemoteProtocolError`."""
        if peer in self._asking:
            raise Rejected(RefusalReason.BUSY, "your last question is still being worked on")
        self._asking.add(peer)
        try:
            return await self._quote(peer, asked)
        finally:
            self._asking.discard(peer)

    async def _quote(self, peer: PeerId, asked: RequestQuote) -> tuple[Quote, Terms, Domain]:
        domain = Domain(asked.chain_id, Address(asked.contract))
        asset, clock = await self._check_frame(asked, domain)
        self._make_room(peer, len(asked.spec), clock.now)
        spec = decode_spec(asked.spec)
        self._check_spec(spec)
        counts = await self._count(peer, spec)
        terms = Terms(
            price=asset.price,
            input_tokens=counts,
            max_tokens=spec.params.max_tokens,
            nonce=self._random16(),
        )
        self._check_worth(asked, asset, terms)
        latest = self.latest_start(ModelId(spec.model_id), terms, asked.deadline, clock.now + self.rules.open_s)
        raw_terms = encode_terms(terms)
        quote = Quote(
            spec_hash=content_hash(asked.spec),
            client=Address(asked.client),
            worker=self._worker,
            token=Address(asked.token),
            amount=terms.amount,
            penalty=amount_from_wire(asked.min_penalty),
            valid_before=min(clock.now + self.rules.valid_s, latest),  # who opens it later could not be served in time
            deadline=asked.deadline,
            window=asked.window,
            resolver=Address(asked.resolver),
            salt=terms_hash(raw_terms),
        )
        await self._check_stake(domain, quote)
        await self._hold(peer, domain, quote, raw_terms, asked.spec, terms.room)
        return quote, terms, domain

    # ---------------------------------------------------------------------------------------------- cheap before dear

    async def _check_frame(self, asked: RequestQuote, domain: Domain) -> tuple[BatchAsset, ChainClock]:
        rules, chain = self.rules, self._chains.get(domain)
        if chain is None:
            raise Rejected(RefusalReason.NO_BATCH, f"no batch jobs by contract {Address(asked.contract)} here")
        asset = self.assets.get((domain, Address(asked.token)))
        if asset is None:
            raise Rejected(RefusalReason.WRONG_DOMAIN, f"token {Address(asked.token)} is not taken for batch jobs")
        await chain.clock.look()
        left = asked.deadline - chain.clock.now
        if not rules.min_duration <= left <= rules.max_duration:
            raise Rejected(
                RefusalReason.DEADLINE_INVALID,
                f"{left} s are left, {rules.min_duration} to {rules.max_duration} are taken",
            )
        if not MIN_WINDOW <= asked.window <= rules.max_window:
            raise Rejected(RefusalReason.TERMS_UNACCEPTABLE, f"the window is {MIN_WINDOW} to {rules.max_window} s")
        if Address(asked.resolver) not in rules.resolvers:
            raise Rejected(RefusalReason.TERMS_UNACCEPTABLE, f"{Address(asked.resolver)} may not judge our disputes")
        if amount_from_wire(asked.min_penalty) > asset.max_penalty:
            raise Rejected(RefusalReason.TERMS_UNACCEPTABLE, f"the penalty is at most {asset.max_penalty}")
        if self._backlog()[0] >= rules.max_jobs:
            raise Rejected(RefusalReason.BUSY, f"{rules.max_jobs} batch jobs are open")
        return asset, chain.clock

    def _make_room(self, peer: PeerId, size: int, now: int) -> None:
        self._held = {job: held for job, held in self._held.items() if now < held.valid_before}
        if sum(held.peer == peer for held in self._held.values()) >= HELD_EACH:
            raise Rejected(RefusalReason.BUSY, f"{HELD_EACH} quotes for you still stand")
        if len(self._held) >= HELD_MOST or sum(held.size for held in self._held.values()) + size > HELD_BYTES:
            raise Rejected(RefusalReason.BUSY, "too many quotes still stand; ask again in a minute")

    def _check_spec(self, spec: BatchSpec) -> None:
        model = self._backend.models.get(ModelId(spec.model_id))
        if model is None:
            raise Rejected(RefusalReason.MODEL_UNKNOWN, f"model {ModelId(spec.model_id)} is not served here")
        unknown = set(changed_params(spec.params)) - set(model.params)
        if unknown:
            raise Rejected(RefusalReason.UNSUPPORTED_PARAM, ", ".join(sorted(unknown)))
        # A grammar may pass a limit in the midst of an answer: a client could make us break a promise that is staked. And a
        # result has no place for numbers.
        live = {"response_format", "logprobs"} & set(changed_params(spec.params))
        if live:
            raise Rejected(RefusalReason.UNSUPPORTED_PARAM, f"{', '.join(sorted(live))}: not in batch jobs")
        if spec.params.max_tokens > min(self.rules.max_tokens, model.context_length):
            raise Rejected(
                RefusalReason.MAX_TOKENS_EXCEEDED, f"{spec.params.max_tokens} tokens for one input are too many"
            )

    async def _count(self, peer: PeerId, spec: BatchSpec) -> tuple[int, ...]:
        """Prompt tokens of each input: the dear part, in a thread, one at a time."""
        around = sum(len(message.content) for message in spec.messages)
        self._characters.take(peer, self._now_ms() // 1000, around * len(spec.inputs) + sum(map(len, spec.inputs)))
        return await trio.to_thread.run_sync(self._tokenise, spec, limiter=self._tokenising)

    def _tokenise(self, spec: BatchSpec) -> tuple[int, ...]:
        model = ModelId(spec.model_id)
        context = self._backend.models[model].context_length
        counts = []
        for index in range(len(spec.inputs)):
            try:
                count = len(self._backend.prepare(model, spec.prompt(index)).token_ids)
            except PromptInvalid as error:
                raise Rejected(RefusalReason.PROMPT_INVALID, f"input {index}: {error}"[:300]) from None
            except ModelError as error:
                log.error("the model runtime cannot take a prompt: %s", error)
                raise Rejected(RefusalReason.INTERNAL, "the model runtime failed") from None
            if count + spec.params.max_tokens > context:
                raise Rejected(
                    RefusalReason.CONTEXT_EXCEEDED,
                    f"input {index}: {count} prompt tokens and {spec.params.max_tokens} to generate, context {context}",
                )
            if not self._backend.could_fit(model, count + spec.params.max_tokens):
                raise Rejected(
                    RefusalReason.CONTEXT_EXCEEDED,
                    f"input {index}: {count} prompt tokens and {spec.params.max_tokens} to generate are more than this "
                    "worker's memory holds",
                )
            counts.append(count)
        return tuple(counts)

    def _check_worth(self, asked: RequestQuote, asset: BatchAsset, terms: Terms) -> None:
        most = amount_from_wire(asked.max_amount)
        if terms.amount > most:
            raise Rejected(RefusalReason.OVER_BUDGET, f"up to {terms.amount}, {most} is offered")
        if terms.amount < asset.min_amount:
            raise Rejected(
                RefusalReason.BELOW_MINIMUM, f"the job is worth {terms.amount}, at least {asset.min_amount} is needed"
            )
        _, _, room = self._backlog()
        held = sum(quote.room for quote in self._held.values())
        kept = self._results.held_bytes(self._now_ms())
        if kept + room + held + terms.room + len(asked.spec) > self._results.max_bytes:
            raise Rejected(RefusalReason.JOB_TOO_LARGE, f"there is no room for a result of up to {terms.room} bytes")

    def latest_start(self, model: ModelId, terms: Terms, deadline: int, start: int) -> int:
        """Chain seconds by which such a job has to begin, behind all that is to be done before it. Raises `Rejected` when `start`
        is later than that."""
        _, seconds, _ = self._backlog()
        needed = math.ceil(seconds + self.seconds_of(model, terms.input_tokens, terms.max_tokens))
        latest = deadline - self.rules.margin_s - needed
        if start > latest:
            left = deadline - self.rules.margin_s - start
            raise Rejected(
                RefusalReason.DEADLINE_INVALID, f"about {needed} s of work lie before its end, {left} s are left for it"
            )
        return latest

    def seconds_of(self, model: ModelId, input_tokens: Iterable[int], max_tokens: int) -> float:
        """How long inputs take one after the other, by what the self-test measured; 0 when it measured nothing."""
        speed = self._speeds.get(model, Speed())
        if not speed.tokens_per_second:
            return 0.0
        return sum(speed.ttft_ms / 1000 + max_tokens / speed.tokens_per_second for _ in input_tokens)

    async def _check_stake(self, domain: Domain, quote: Quote) -> None:
        if quote.penalty and await self._chains[domain].jobs.holdable(self._worker, quote.token) < quote.penalty:
            raise Rejected(RefusalReason.TERMS_UNACCEPTABLE, f"no stake of {quote.penalty} is free now")

    # ------------------------------------------------------------------------------------------------------- what is held

    async def _hold(self, peer: PeerId, domain: Domain, quote: Quote, terms: bytes, spec: bytes, room: int) -> None:
        held = HeldQuote(
            peer=str(peer),
            chain_id=domain.chain_id,
            contract=bytes(domain.verifying_contract),
            quote=quote_to_wire(quote),
            terms=terms,
            spec=spec,
        )
        raw, now = msgspec.msgpack.encode(held), self._now_ms()
        job_id = quote.job_id(domain)
        self._make_room(peer, len(spec), self._chains[domain].clock.now)  # again: others may have been faster
        self._held[job_id] = _Held(peer, quote.valid_before, len(spec), room)
        try:
            await self._results.put(spec_key(job_id), raw, now + (self.rules.valid_s + 60) * 1000, now_ms=now)
        except ResultsFull:
            self._held.pop(job_id, None)
            raise Rejected(RefusalReason.JOB_TOO_LARGE, "there is no room for the specification") from None

    def held(self, job_id: JobId) -> tuple[HeldQuote, bytes] | None:
        """A quote that is on disk, and its bytes there; also after a restart."""
        raw = self._results.get(spec_key(job_id))
        return None if raw is None else (msgspec.msgpack.decode(raw, type=HeldQuote), raw)

    def ordered(self, job_id: JobId) -> None:
        """It is a job now, and counted as one."""
        self._held.pop(job_id, None)


def message_of(quote: Quote, terms: Terms, signature: bytes) -> QuoteMessage:
    return QuoteMessage(quote=quote_to_wire(quote), signature=signature, terms=encode_terms(terms))


def parts_of(held: HeldQuote) -> tuple[Quote, Terms, BatchSpec]:
    """Raises `RemoteProtocolError` when the disk holds what was never accepted."""
    return quote_from_wire(held.quote), decode_terms(held.terms), decode_spec(held.spec)
