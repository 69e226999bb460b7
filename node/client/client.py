"""The client library: find a worker, pay it, stream from it, check it.

    async with Client.connect(config) as client:
        await client.deposit(5_000_000)
        async with client.chat("smollm2-135m-instruct", [{"role": "user", "content": "Hello"}]) as stream:
            async for chunk in stream:
                print(chunk.text, end="")
        print(stream.receipt)

Imports neither torch nor the worker. Everything a `Client` holds is handed to it (`node.client.connect` builds it from a
`Config`), so tests give it a network in memory and a chain in memory.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from node.client.answers import Answers
from node.client.chat import ChatStream
from node.client.choosing import Choosing, TokenCounter
from node.client.evidence import Evidence
from node.client.job import Job
from node.client.job_posting import Confirm
from node.client.job_quotes import JobWish
from node.client.jobs import ClientJobs
from node.client.settings import MAX_ANSWERS, ClientSettings
from node.client.tasks import Ranking, Vectors, embed, ocr, rerank, sound, transcribe
from node.client.vocabulary import Vocabulary
from node.client.vouchers import Vouchers
from node.client.wallet import ClientWallet
from node.errors import ConfigError, InsufficientFunds, NetworkError, NodeError, NoWorker, Timeout
from node.network.discovery import OfferBook, discover, fetch_offer
from node.ports import Network, Signer, TxResult
from node.store.batch import BatchBook
from node.store.channels import ChannelBook
from node.store.meter import Meter
from node.store.results import Results
from protocol.channel import Change, ChannelState, Role, apply
from protocol.errors import InvalidValue, RemoteProtocolError
from protocol.ids import ChannelId, ModelId, PeerId
from protocol.logprobs import ID_LIMIT
from protocol.messages import ChatMessage, Params, checked
from protocol.offers import Asset, VerifiedOffer
from protocol.sampling import seed_of
from protocol.selection import Candidate, History, Policy
from protocol.tasks import ChatRequest, TaskRequest
from protocol.workload import PLACE

if TYPE_CHECKING:
    from node.config import Config

log = logging.getLogger(__name__)


class Client:
    """One paying identity: a payer's funds, a session key, a journal."""

    def __init__(
        self,
        *,
        network: Network,
        wallet: ClientWallet,
        offers: OfferBook,
        settings: ClientSettings,
        spawn: Callable[[Callable[[], Awaitable[None]]], None],
        now_ms: Callable[[], int],
        random32: Callable[[], bytes],
        bootstrap: tuple[str, ...] = (),
        counter: TokenCounter | None = None,
        vocabulary: Callable[[ModelId], Vocabulary | None] = lambda _: None,
    ) -> None:
        self.network = network
        self.wallet = wallet
        self.offers = offers
        self.settings = settings
        self.spawn = spawn
        self.now_ms = now_ms
        self.random32 = random32
        self.meter = Meter()
        self.evidence = Evidence(wallet.book.ledger)
        self.history: dict[PeerId, History] = {}
        self.problems: list[str] = []
        """What failed when the bootstrap peers were dialled, in words."""
        self._bootstrap = bootstrap
        self.choosing = Choosing(offers=offers, wallet=wallet, history=self.history, now_ms=now_ms, counter=counter)
        """Which worker a request goes to."""
        self.vocabulary = vocabulary
        """Of a model whose tokenizer is at hand."""

        self.jobs = ClientJobs(
            client=self,
            network=network,
            results=Results(wallet.book.ledger),
            book=BatchBook.restore(wallet.book.ledger, Role.CLIENT),
            sign=wallet.payer.sign,
            timing=settings.jobs,
            now_ms=now_ms,
            poll_s=settings.job_poll_s,
            reread_s=settings.job_reread_s,
            slash_min=settings.slash_min,
            slash_look_s=settings.slash_look_s,
        )
        """Batch jobs; somebody has to `run` them."""

    @staticmethod
    def connect(config: Config, **options: Any) -> AbstractAsyncContextManager[Client]:
        """A client with real network, chain and journal. See `node.client.connect.connect` for the options."""
        from node.client.connect import connect

        return connect(config, **options)

    # -------------------------------------------------------------------------------------------------- shortcuts

    @property
    def session(self) -> Signer:
        return self.wallet.session

    @property
    def vouchers(self) -> Vouchers:
        return self.wallet.vouchers

    @property
    def book(self) -> ChannelBook:
        return self.wallet.book

    def preview(self, channel_id: ChannelId, change: Change) -> ChannelState:
        """The state that a change will lead to; nothing happens yet."""
        state, _ = apply(self.book.channels[channel_id], change)
        return state

    # ------------------------------------------------------------------------------------------------------ money

    async def deposit(self, amount: int, asset: Asset | None = None, *, request: str = "") -> list[TxResult]:
        """Put `amount` into the vault, in the smallest unit of `asset` (by default what we pay with first): the only
        transaction a client needs. Under one `request` id it happens once, however often it is asked for."""
        return await self.wallet.deposit(amount, asset, request=request)

    async def balance(self, asset: Asset | None = None) -> int:
        return await self.wallet.balance(asset)

    # ------------------------------------------------------------------------------------------------------- chat

    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, str] | ChatMessage],
        *,
        policy: Policy | None = None,
        **params: Any,
    ) -> ChatStream:
        """A streamed answer, as an async context manager. `params` are the fields of `protocol.messages.Params`.

        Entering it raises `NoWorker` (with the reasons, per worker), `InsufficientFunds`, `Refused`, `WorkerFault`,
        `Timeout`, `NetworkError` or `ChainError`; iterating it raises `WorkerFault`, `VerificationFailed` or `Timeout`.
        """
        return self.run(model, ChatRequest(_messages(messages)), policy=policy, **params)

    def run(
        self,
        model: str,
        request: TaskRequest,
        media: AsyncIterable[bytes] | None = None,
        *,
        policy: Policy | None = None,
        seconds: float = 0.0,
        **params: Any,
    ) -> ChatStream:
        """Any task as a stream, raising as `chat` does, and `ConfigError` for what cannot be asked.

        `media`: what follows the ask, where the request declares more than it carries. `seconds`: how much longer than
        `client.deadline_ms` that may take.
        """
        asked, wanted = sound(request), _params(params)
        return ChatStream(
            self,
            model,
            asked,
            wanted,
            lambda: self.choosing.select(model, asked, wanted, policy or Policy()),
            media=media,
            extra_s=seconds,
        )

    async def embed(self, model: str, texts: Sequence[str], *, policy: Policy | None = None) -> Vectors:
        """A vector for each text, with the receipt. Raises as a chat does."""
        return await embed(self, model, texts, policy=policy)

    async def rerank(
        self, model: str, query: str, documents: Sequence[str], *, policy: Policy | None = None
    ) -> Ranking:
        """The documents by how well they answer the query, best first, with the receipt. Raises as a chat does."""
        return await rerank(self, model, query, documents, policy=policy)

    def transcribe(
        self,
        model: str,
        audio: bytes | AsyncIterable[bytes],
        *,
        max_seconds: float | None = None,
        policy: Policy | None = None,
        max_tokens: int | None = None,
    ) -> ChatStream:
        """What is said, as it is heard. `audio`: the bytes of a WAV file, raw samples (16 bits, little-endian, mono, 16 kHz),
        or such samples as they come; then at most `max_seconds` of them. Raises as `chat` does, and `ConfigError`."""
        return transcribe(self, model, audio, max_seconds=max_seconds, policy=policy, max_tokens=max_tokens)

    def ocr(
        self, model: str, image: bytes, *, policy: Policy | None = None, max_tokens: int | None = None
    ) -> ChatStream:
        """What is written in a PNG or JPEG image, line by line. Raises as `chat` does, and `ConfigError`."""
        return ocr(self, model, image, policy=policy, max_tokens=max_tokens)

    def answers(
        self,
        model: str,
        messages: Sequence[Mapping[str, str] | ChatMessage],
        n: int,
        *,
        policy: Policy | None = None,
        **params: Any,
    ) -> Answers:
        """`n` answers to one request, side by side: see `node.client.answers`. `policy.max_cost` is for all of them together.

        Entering it raises as entering a chat does, `InsufficientFunds` where there is too little for all; what happens to one
        answer later is told of that answer. Raises `ConfigError` for another `n` than 1 to `MAX_ANSWERS`.
        """
        if not 1 <= n <= MAX_ANSWERS:
            raise ConfigError(f"from 1 to {MAX_ANSWERS} answers can be asked for, not {n}")
        each = policy or Policy()
        if each.max_cost is not None:
            each = replace(each, max_cost=each.max_cost // n)
        asked, wanted = sound(ChatRequest(_messages(messages))), _params(params)

        def stream(index: int, choose: Callable[[], list[Candidate]]) -> ChatStream:
            own = msgspec.structs.replace(wanted, seed=seed_of(wanted.seed, index))
            return ChatStream(self, model, asked, own, choose)

        return Answers(self, model, lambda: self.choosing.select(model, asked, wanted, each), stream, n)

    async def post_job(
        self,
        model: str,
        inputs: Sequence[str],
        *,
        id: str = "",  # noqa: A002 (the word that callers use)
        messages: Sequence[Mapping[str, str] | ChatMessage] = ({"role": "user", "content": PLACE},),
        policy: Policy | None = None,
        wish: JobWish | None = None,
        confirm: Confirm | None = None,
        **params: Any,
    ) -> Job:
        """Order a batch job: the same messages around each input, in escrow. See `node.client.job_posting.JobPosting.post`.

        `id`: the caller's name of the job; posting the same name again goes on with the same job. By default a random one.
        """
        name = id or self.random32()[:6].hex()
        job_id = await self.jobs.posting.post(
            model, inputs, id=name, messages=messages, wish=wish, policy=policy, confirm=confirm, **params
        )
        return Job(self.jobs, job_id)

    async def open_channel(
        self,
        model: str,
        messages: Sequence[Mapping[str, str] | ChatMessage],
        *,
        policy: Policy | None = None,
        **params: Any,
    ) -> tuple[ChannelState, bytes]:
        """Open the channel that such a chat will need, if there is none: afterwards a chat is one round trip.

        Returns the channel and the hash of the transaction by which the worker submitted our allocation (empty when the
        channel was there). Raises as entering a chat does.
        """
        return await self.chat(model, messages, policy=policy, **params).open_channel()

    async def open_one(
        self, model: str, select: Callable[[], list[Candidate]], jobs: int = 1
    ) -> tuple[ChannelState, bytes]:
        """A channel to the first of these that there is money for, with room for so many jobs at once; as `open_channel`."""
        short: InsufficientFunds | None = None
        for candidate in await self.funded(select):
            await self.reach(candidate.offer)
            try:
                return await self.wallet.ensure_channel(candidate.offer, candidate.payment, jobs * candidate.cost)
            except InsufficientFunds as error:  # there may be more of what it can be paid with otherwise
                short = short or error
        raise short if short is not None else NoWorker(f"no worker can serve {model!r}", {})

    async def funded(self, select: Callable[[], list[Candidate]]) -> list[Candidate]:
        """`select`, and once more when only money is missing: somebody may have deposited since we looked."""
        try:
            return select()
        except InsufficientFunds:
            await self.wallet.look()
            return select()

    def vocabulary_size(self, model: ModelId) -> int:
        """Ids from here on are none of the model's; where the model is not at hand, none of any model's."""
        known = self.vocabulary(model)
        return ID_LIMIT if known is None else known.size

    # ---------------------------------------------------------------------------------------------------- workers

    async def discover(self) -> list[str]:
        """Dial the bootstrap peers and fetch their offers; returns what failed, in words."""
        return await discover(self.network, self.offers, self._bootstrap)

    async def meet(self, multiaddr: str) -> VerifiedOffer:
        """Dial one worker and fetch its offer. Raises `NetworkError`, `Timeout` or `RemoteProtocolError`."""
        peer = await self.network.connect(multiaddr)
        return await fetch_offer(self.network, self.offers, peer)

    async def reach(self, offer: VerifiedOffer) -> PeerId:
        """Be connected to a worker. Raises `NetworkError` naming every address that failed."""
        if offer.peer_id in self.network.peers:
            return offer.peer_id
        failures = []
        for address in offer.document.addresses:
            try:
                return await self.network.connect(address)
            except NetworkError as error:
                failures.append(f"{address}: {error}")
        raise NetworkError(f"{offer.peer_id} cannot be reached", hint="; ".join(failures) or "its offer has no address")

    async def refresh_offers(self) -> None:
        """Fetch again from every peer whose offer is about to expire; a worker that does not answer is forgotten."""
        now = self.now_ms()
        for offer in self.offers.current():
            if offer.document.expires - now > 15_000:
                continue
            try:
                with trio.fail_after(5):
                    await self.reach(offer)
                    await fetch_offer(self.network, self.offers, offer.peer_id, timeout_s=5)
            except (NodeError, RemoteProtocolError, trio.TooSlowError) as error:
                log.info("%s no longer offers: %s", offer.peer_id, error)

    def succeeded(self, peer: PeerId, tokens: int, seconds: float) -> None:
        """Take a finished part into the history: speed as an average that forgets by halves."""
        seen = self.history.get(peer, History())
        speed = tokens / seconds if seconds > 0 and tokens > 1 else seen.tokens_per_second
        mean = speed if not seen.tokens_per_second else (seen.tokens_per_second + speed) / 2
        self.history[peer] = replace(seen, tokens_per_second=mean, completed=seen.completed + 1, failures=0)

    def failed(self, peer: PeerId) -> None:
        seen = self.history.get(peer, History())
        self.history[peer] = replace(seen, failures=seen.failures + 1, last_failure_ms=self.now_ms())


def _messages(messages: Sequence[Mapping[str, str] | ChatMessage]) -> tuple[ChatMessage, ...]:
    try:
        return tuple(
            checked(m if isinstance(m, ChatMessage) else ChatMessage(**m))  # type: ignore[arg-type]
            for m in messages
        )
    except (TypeError, InvalidValue) as error:
        raise ConfigError(f"the messages are not valid: {error}", hint='[{"role": "user", "content": "..."}]') from None


def _params(params: Mapping[str, Any]) -> Params:
    try:
        return checked(Params(**params))
    except (TypeError, InvalidValue) as error:
        raise ConfigError(f"the parameters are not valid: {error}") from None


__all__ = ["Client", "NetworkError", "Timeout"]
