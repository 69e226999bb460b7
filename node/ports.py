"""The ports: what the rest of the node may ask of the network, the keys, the chain and a model runtime.

A port exists only where a real and a fake implementation exist: `node.network.host` and `node.network.memory`,
`node.chain.client` and `node.chain.memory`, `node.runtime.backend` and `node.testing.fake_backend`, `node.signer.client` and
`node.signer.bare`. Everything above works
on these types; `node.app` is the only place where concrete classes meet.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from node.errors import ContractRefused
from protocol.escrow import JobState, Outcome, Slash
from protocol.ids import Address, ChannelId, Hash32, JobId, ModelId, PeerId
from protocol.logprobs import LOGPROBS_LIMIT
from protocol.messages import ChatMessage, FinishReason, Params, ResponseFormat
from protocol.signing import Signable
from protocol.tasks import Task, TaskRequest
from protocol.transactions import SignedTransaction, Transaction
from protocol.typed_data import ChannelConfig, Domain, Quote

# ----------------------------------------------------------------------------------------------------------- network


class StreamClosed(Exception):
    """The stream or its connection ended under us: reset, broken, or the peer went away."""


class ByteStream(Protocol):
    """One bidirectional stream with one remote peer. One writer task at a time."""

    @property
    def remote_peer(self) -> PeerId: ...

    async def send_all(self, data: bytes) -> None:
        """Raises `StreamClosed`. A cancelled write resets the stream, never tears the connection."""

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        """Some bytes, or ``b""`` when the far end has closed its side. Raises `StreamClosed` after a reset."""

    async def aclose(self) -> None: ...

    async def reset(self) -> None: ...


StreamHandler = Callable[[ByteStream], Awaitable[None]]


class Network(Protocol):
    """Reach peers by PeerId; serve protocols by name; gossip."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Full multiaddrs, each ending in ``/p2p/<PeerId>``."""

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """Peers with a live connection."""

    def handle(self, protocol: str, handler: StreamHandler) -> None: ...

    async def connect(self, multiaddr: str) -> PeerId:
        """Dial and authenticate. Raises `node.errors.NetworkError` with what failed."""

    async def open_stream(self, peer: PeerId, protocol: str) -> ByteStream: ...

    async def publish(self, topic: str, data: bytes) -> None: ...

    async def subscribe(
        self,
        topic: str,
        accept: Callable[[bytes], bool],
        receive: Callable[[bytes], Awaitable[None]],
    ) -> None:
        """`accept` is the gossip validator: what it refuses is not forwarded. It must be fast and never raise."""


# ------------------------------------------------------------------------------------------------------------- keys


class Identity(Protocol):
    """The key of a peer, as the network needs it: its secret stays where it is."""

    @property
    def public_key(self) -> bytes:
        """Compressed, 33 bytes."""

    @property
    def peer_id(self) -> PeerId: ...

    def sign_identity(self, data: bytes) -> bytes:
        """Signature of one of libp2p's messages (`protocol.identity`), DER. Not async, because libp2p is not: it may block for
        a moment. Raises for anything else."""


class Signer(Identity, Protocol):
    """One key behind a policy. What it signs is on record, durable, before anybody holds the signature.

    Raises `node.errors.SignerRefused` when the policy says no, `SignerFailed` when nothing is signed any more.
    """

    @property
    def address(self) -> Address: ...

    @property
    def failure(self) -> str | None:
        """Why nothing is signed any more, or None."""

    async def sign(self, struct: Signable, domain: Domain) -> bytes:
        """65 bytes r || s || v. Cancelled, it still waits a moment: a caller is to know what was signed."""

    async def sign_all(self, asked: Sequence[tuple[Signable, Domain]]) -> list[bytes]:
        """Several at once, for the price of one wait."""

    async def weigh(self, struct: Signable, domain: Domain) -> None:
        """Whether the policy would let this be signed now; nothing is. Before something is journaled that would have to be."""

    async def sign_transaction(self, transaction: Transaction) -> SignedTransaction: ...


# ------------------------------------------------------------------------------------------------------------- chain


@dataclass(frozen=True, slots=True)
class Head:
    number: int
    hash: bytes
    timestamp: int
    """Unix seconds, chain time."""


@dataclass(frozen=True, slots=True)
class ChannelOnChain:
    allocated: int
    claimed: int
    withdraw_at: int
    """Chain seconds from which the payer may take the rest; 0 when no withdrawal has begun."""
    closed: bool


@dataclass(frozen=True, slots=True)
class WorkerOnChain:
    """A hot key's record in the Workers contract; all zero when it has none."""

    owner: Address
    active: bool
    payout: Address
    nonce: int
    """The one that the next `HotKey` consent must carry."""


@dataclass(frozen=True, slots=True)
class VaultOnChain:
    """The Vault in one token, at one block. It is solvent while the first is not below the second."""

    coins: int
    """What the token says that the vault has."""
    liabilities: int
    """What the vault says that it owes: free balances and everything locked."""


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """How people write amounts of a token. What the token says of itself decides nothing: amounts are counted in the smallest
    unit everywhere."""

    address: Address
    symbol: str
    """At most 16 printable ASCII characters; the native coin's is `coin`."""
    decimals: int
    """0 to 36; 0 also for a token that does not say."""

    def show(self, amount: int) -> str:
        """``5250000`` of a token with six decimals as ``5.25 tUSD``: exact, no trailing zeros."""
        whole, part = divmod(abs(amount), 10**self.decimals)
        digits = str(part).rjust(self.decimals, "0").rstrip("0") if part else ""
        return f"{'-' if amount < 0 else ''}{whole}{'.' + digits if digits else ''} {self.symbol}"


@dataclass(frozen=True, slots=True)
class TxResult:
    purpose: str
    hash: bytes
    block: int
    gas_used: int
    ok: bool
    error: str = ""
    """Name of the contract's custom error when it reverted."""

    def sound(self) -> TxResult:
        """The same. Raises `ContractRefused` when the contract did not take it."""
        if not self.ok:
            raise ContractRefused(self.purpose, self.error)
        return self


@dataclass(frozen=True, slots=True)
class ClaimEntry:
    config: ChannelConfig
    amount: int
    """New claimed total that the worker asks for: what its receipts add up to, at most `cumulative`."""
    cumulative: int
    """The voucher's amount."""
    signature: bytes


@dataclass(frozen=True, slots=True)
class ChainEvent:
    """One log of our contracts, delivered in order; `removed` undoes it after a reorg."""

    name: str
    block_number: int
    block_hash: bytes
    log_index: int
    args: Mapping[str, Any] = field(default_factory=dict)
    removed: bool = False


@dataclass(frozen=True, slots=True)
class JobOnChain:
    """A batch job as the Jobs contract has it."""

    state: JobState
    window_end: int
    """Chain seconds; 0 but from the submission to the end."""
    claimed: int
    """As `window_end`."""
    result_hash: Hash32


@dataclass(frozen=True, slots=True)
class DisputeOnChain:
    resolve_by: int
    """Chain seconds from which silence is a draw; 0 when there is no dispute."""
    outcome: Outcome
    """How it ended, or what its resolver has found by now."""


class Jobs(Protocol):
    """The Jobs contract, and Disputes as far as it is about a job, for one account. Raises and returns as `Chain` does."""

    @property
    def domain(self) -> Domain: ...

    @property
    def committee(self) -> Address:
        """The deployment's committee, which quotes may name as their resolver; the zero address when it has none."""

    async def job(self, job_id: JobId) -> JobOnChain:
        """What begins or ends a job counts when it is confirmed, the rest at once."""

    async def confirmed_time(self) -> int | None:
        """Chain seconds of the newest block that is confirmed: what `job` does not show as opened then was not opened before.
        None where the newest block of all counts."""

    async def paid(self, quote: Quote) -> int | None:
        """What a settled job paid its worker, by its event; None when there is none. Raises `ChainError`."""

    async def dispute(self, quote: Quote) -> DisputeOnChain: ...

    async def dispute_bond(self, quote: Quote) -> int: ...

    async def holdable(self, worker: Address, token: Address) -> int:
        """The highest penalty that a new job of this hot key can hold of its owner's stake."""

    async def open(self, quote: Quote, worker_signature: bytes, order_signature: bytes) -> TxResult: ...

    async def submit(self, quote: Quote, result_hash: Hash32, claimed: int, signature: bytes) -> TxResult: ...

    async def settle(self, quote: Quote, result_hash: Hash32, amount: int, signature: bytes) -> TxResult: ...

    async def finalize(self, quote: Quote) -> TxResult: ...

    async def refund(self, quote: Quote) -> TxResult: ...

    async def fail(self, quote: Quote) -> TxResult:
        """Only for the worker and its owner."""

    async def open_dispute(self, quote: Quote, evidence: Hash32) -> TxResult:
        """Only for the client; locks the bond out of its vault balance."""

    async def resolve_dispute(self, quote: Quote) -> TxResult: ...


class Slashes(Protocol):
    """Booked slashes in the Workers contract, for one account. Raises and returns as `Chain` does."""

    async def get(self, slash_id: int) -> Slash:
        """Of state NONE when nothing has this number. Numbers begin at 1 and have no holes."""

    async def move(self, slash_id: int) -> TxResult:
        """Pay it out, once it is due; whoever asks."""


REORG_DEPTH: Final = 64
"""Blocks that can be undone one event at a time. A deeper reorganisation is an error, not a guess."""


class Chain(Protocol):
    """Our contracts on one chain, seen and changed by one account.

    Writes are journaled before they are sent and return after the receipt. Every method may raise
    `node.errors.ChainError`; a revert is a `TxResult` with ``ok=False`` and the custom error's name.
    """

    @property
    def chain_id(self) -> int: ...

    @property
    def domain(self) -> Domain:
        """Domain of the Channels contract."""

    @property
    def workers_domain(self) -> Domain: ...

    @property
    def jobs(self) -> Jobs | None:
        """Batch jobs; None where the deployment has none."""

    @property
    def slashes(self) -> Slashes:
        """Penalties that are booked, and how they become money."""

    @property
    def token(self) -> Address:
        """The default token of this deployment."""

    @property
    def account(self) -> Address:
        """The account that signs and pays for our transactions."""

    async def head(self) -> Head: ...

    async def native_balance(self, account: Address) -> int: ...

    async def token_balance(self, token: Address, account: Address) -> int: ...

    async def token_info(self, token: Address) -> TokenInfo:
        """Name and decimals for display; never raises for what an odd token answers."""

    async def vault_balance(self, token: Address, account: Address) -> int: ...

    async def vault(self, token: Address) -> VaultOnChain:
        """What the vault has and owes, both read at one block: between two, a deposit would look like a hole."""

    async def channel(self, channel_id: ChannelId) -> ChannelOnChain: ...

    async def owed(self, receiver: Address, token: Address) -> int: ...

    async def payout_of(self, worker: Address) -> Address:
        """Where earnings go: the registered payout, or the worker's own account."""

    async def worker(self, hot_key: Address) -> WorkerOnChain: ...

    async def fee(self) -> int:
        """What a transaction would pay now, wei per gas."""

    async def catch_up(self) -> None:
        """Bring our earlier transactions to their end: those that timed out, and those that a reorganisation threw out.

        `allocate`, `claim` and `settle` follow from what the chain shows, so they raise `node.errors.ChainMoved` instead of
        sending when such transactions had to be brought to their end first: look again, and decide anew.
        """

    def once(self, request: str) -> Chain:
        """The same chain, whose transactions carry a request id: under one id each purpose happens once, restarts included, and
        asking again gives the first result. An empty id is no id."""

    def has_answered(self, request: str, purpose: str) -> bool:
        """Whether the transaction called `purpose` of this request has its end."""

    async def deposit(self, token: Address, amount: int) -> Sequence[TxResult]: ...

    async def withdraw(self, token: Address, amount: int, to: Address) -> TxResult: ...

    async def allocate(
        self, config: ChannelConfig, allocated: int, valid_before: int, signature: bytes
    ) -> TxResult: ...

    async def claim(self, entries: Sequence[ClaimEntry]) -> TxResult: ...

    async def settle(self, receiver: Address, token: Address) -> TxResult: ...

    async def close_channel(
        self,
        config: ChannelConfig,
        final: int,
        voucher: int,
        voucher_signature: bytes,
        close_signature: bytes,
    ) -> TxResult: ...

    async def initiate_withdraw(self, config: ChannelConfig) -> TxResult: ...

    async def finalize_withdraw(self, config: ChannelConfig) -> TxResult: ...

    async def register_worker(self, hot_key: Address, payout: Address, deadline: int, signature: bytes) -> TxResult:
        """This account becomes the owner of `hot_key`; `signature` is the hot key's consent."""

    async def set_payout(self, hot_key: Address, payout: Address) -> TxResult:
        """Only for the owner of `hot_key`."""

    def events(self, start: int | None = None) -> AsyncIterator[ChainEvent]:
        """Logs of our contracts from block `start` on, each once per canonical block; reorgs as ``removed``.

        When None, from `REORG_DEPTH` blocks below the head: for a reader that has just read the state itself and needs no
        history. An iterator that raised is over. Take a new one from `REORG_DEPTH` below the last block that was told, or read
        the state anew, as one must after `node.errors.ReorgTooDeep`.
        """


# ----------------------------------------------------------------------------------------------------------- runtime


SAMPLING_PARAMS: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "stop",
)
"""Fields of `Params` that a runtime with the normative sampler honours: all that decide the tokens (`protocol.sampling`)."""


def offered_logprobs(vocabulary: int) -> tuple[str, ...]:
    """The field `logprobs`, for a runtime that has the model's own logits over so many tokens: one that has fewer than may be
    asked for offers none."""
    return ("logprobs",) if vocabulary >= LOGPROBS_LIMIT else ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a runtime says of a model that it has loaded or can load."""

    id: ModelId
    name: str
    context_length: int
    dtype: str
    numerics_class: str
    """Hash of a golden probe's outputs: equal classes can be compared bit for bit. Empty: nothing can be compared, because the
    sampler is not the normative one."""
    params: tuple[str, ...] = SAMPLING_PARAMS
    """Fields of `Params` that are honoured; what is not here is not offered."""
    tasks: tuple[Task, ...] = (Task.CHAT,)
    dimensions: int = 0
    """Numbers in one vector, for a model that embeds."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What the self-test measured of a model before it was offered."""

    tokens_per_second: float = 0.0
    ttft_ms: float = 0.0
    """Of a model that is loaded when a job wants it, the load included."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request made ready for the engine."""

    model: ModelId
    token_ids: tuple[int, ...]
    salt: bytes = b""
    """Names the tenant: what is kept of prompts is shared among equal salts only (`node.worker.tenants`)."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one engine step adds to one stream."""

    token_ids: tuple[int, ...]
    text: str
    """The text these ids complete; bytes of an unfinished character wait for the next step."""
    finish_reason: FinishReason | None = None
    data: bytes = b""
    """Whole rows of float32, little-endian, for tasks whose answer is numbers (`protocol.tasks.Shape`); of a chat that asks for
    log probabilities one row for each of the ids (`protocol.logprobs`)."""


class Backend(Protocol):
    """A model runtime. Prompt text, templates and token counts are decided here and nowhere else."""

    @property
    def models(self) -> Mapping[ModelId, ModelInfo]: ...

    def prepare(self, model: ModelId, messages: Sequence[ChatMessage]) -> Prompt:
        """Render the template and tokenise. Raises `node.errors.PromptInvalid`."""

    def check_format(self, model: ModelId, wanted: ResponseFormat, resume: Sequence[int] = ()) -> None:
        """Make a grammar ready for `generate`, which may take seconds: called from any thread. Raises `PromptInvalid` for one
        that is no good or that the ids delivered before do not follow. Asked only where `ModelInfo.params` names the format."""

    def generate(self, prompt: Prompt, params: Params, resume: Sequence[int] = ()) -> AsyncGenerator[Step, None]:
        """Stream one completion; closing the iterator aborts it within a step. `resume`: ids already delivered."""

    def fits(self, prompt: Prompt, max_tokens: int) -> bool:
        """Whether there is memory for this job now. Two that are asked about in one moment may not both fit."""

    def could_fit(self, model: ModelId, tokens: int) -> bool:
        """Whether there would be memory for so many tokens, prompt and answer together, if nothing else ran. What cannot fit
        now and could is to be tried again; what could not is to be refused."""

    @property
    def free_slots(self) -> int:
        """How many more streams can start now."""


@dataclass(frozen=True, slots=True)
class TaskInput:
    """A request of another task than chat, made ready."""

    model: ModelId
    request: TaskRequest
    units: int
    """Input units of what came with the ask (`protocol.tasks.UNITS`): tokens as the model's tokenizer counts them, or by
    `protocol.tasks.shape_of` for media."""
    content: object = None
    """The runtime's own, token ids for instance. Nobody else looks at it."""


class TaskBackend(Protocol):
    """A runtime for tasks other than chat."""

    @property
    def models(self) -> Mapping[ModelId, ModelInfo]: ...

    def prepare(self, model: ModelId, request: TaskRequest) -> TaskInput:
        """Tokenise and count. Called from any thread. Raises `node.errors.InputInvalid`, also for a text that is longer than the
        model takes: nothing is ever cut off silently."""

    def run(
        self, prepared: TaskInput, params: Params, media: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[Step, None]:
        """Stream the answer; closing the iterator aborts it. Raises `node.errors.ModelError`, and `InputInvalid` for media that
        turn out to be none.

        `media`: all bytes of audio or image in order, those of the request first; audio in whole samples. Its end is the end of
        the input. Pulling it is what the client pays for, so nothing is pulled before it is needed. Empty for texts.

        Rows and texts come in the order of the request. The last step has a finish reason: STOP, or LENGTH when
        `params.max_tokens` ended a text.
        """

    @property
    def free_slots(self) -> int:
        """How many more jobs can start now."""
