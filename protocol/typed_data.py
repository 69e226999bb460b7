"""EIP-712 structs: all that is signed but transactions and libp2p's messages. Solidity shares tests/vectors/typed_data.json.

Each class is one struct: its Solidity string, its fields in order, `struct_hash()` and `digest(domain)`. Encoding is by
hand because it sits on the hot path: one voucher and one receipt per job, thousands a second. `decode` is its inverse, by the
Solidity string, for the signer: it reads what it is asked to sign from the very bytes that are hashed.

Source: EIP-712. `ChannelConfig` and `Voucher` have the struct strings of x402's `batch-settlement` scheme, so that its
clients can pay; our word for `maxClaimableAmount` is *cumulative*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, Final, Self

from protocol.errors import InvalidValue
from protocol.ids import ZERO_ADDRESS, Address, ChannelId, Hash32, JobId, ModelId, keccak256

NAME: Final = "Gristmill"
VERSION: Final = "1"
_DOMAIN_TYPE: Final = keccak256(
    b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)",
)


def _uint(value: int, bits: int) -> bytes:
    if isinstance(value, bool) or not 0 <= value < 1 << bits:
        raise InvalidValue(f"{value} does not fit uint{bits}")
    return value.to_bytes(32)


def _address(value: Address) -> bytes:
    return bytes(12) + value


@dataclass(frozen=True, slots=True)
class Domain:
    """Where a signature is good: one chain, one contract."""

    chain_id: int
    verifying_contract: Address
    separator: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        encoded = (
            _DOMAIN_TYPE
            + keccak256(NAME.encode())
            + keccak256(VERSION.encode())
            + _uint(self.chain_id, 256)
            + _address(self.verifying_contract)
        )
        object.__setattr__(self, "separator", keccak256(encoded))


MARKET_DOMAIN: Final = Domain(0, ZERO_ADDRESS)
"""Domain of what a worker says to the whole market and what moves no money: `Offer`, `Refusal`, `Benchmark`. Chain id 0 and the
zero contract are no chain and no contract, so nothing signed here is good on one, and nothing of a chain is good here."""


class Struct:
    """Shared digest rule; subclasses give `TYPE` (the Solidity string) and `_encode()` (fields, 32 bytes each)."""

    __slots__ = ()
    TYPE: ClassVar[str]
    _HASH: ClassVar[bytes]

    def __init_subclass__(cls) -> None:
        # `dataclass(slots=True)` makes the class a second time; the hash is the same both times.
        if "TYPE" in cls.__dict__:
            cls._HASH = keccak256(cls.TYPE.encode())

    def _encode(self) -> bytes:
        raise NotImplementedError

    def encode(self) -> bytes:
        """The fields in order, 32 bytes each."""
        return self._encode()

    @classmethod
    def decode(cls, encoded: bytes) -> Self:
        """The one struct that encodes to these bytes. Raises `InvalidValue` when none does."""
        readers = _readers(cls)  # type: ignore[arg-type]
        if len(encoded) != 32 * len(readers):
            raise InvalidValue(f"{cls.__name__} has {32 * len(readers)} bytes, not {len(encoded)}")
        return cls(*(read(encoded[32 * n : 32 * n + 32]) for n, read in enumerate(readers)))

    def struct_hash(self) -> bytes:
        return keccak256(self._HASH + self._encode())

    def digest(self, domain: Domain) -> bytes:
        """The 32 bytes that are signed."""
        return keccak256(b"\x19\x01" + domain.separator + self.struct_hash())


_HASHES: Final[dict[str, type[Hash32]]] = {kind.__name__: kind for kind in (Hash32, JobId, ChannelId, ModelId)}


@cache
def _readers(cls: type[Struct]) -> tuple[Callable[[bytes], Any], ...]:
    """One reader per field: its width from the Solidity string, what a bytes32 is called here from the annotation."""
    solidity = [part.split(" ")[0] for part in cls.TYPE[cls.TYPE.index("(") + 1 : -1].split(",")]
    named = [str(one.type) for one in fields(cls)]  # type: ignore[arg-type]
    return tuple(_reader(kind, name) for kind, name in zip(solidity, named, strict=True))


def _reader(kind: str, name: str) -> Callable[[bytes], Any]:
    if kind == "bytes32":
        return _HASHES[name]
    size = 20 if kind == "address" else int(kind.removeprefix("uint")) // 8
    padding = bytes(32 - size)

    def read(word: bytes) -> Any:
        if not word.startswith(padding):
            raise InvalidValue(f"0x{word.hex()} does not fit {kind}")
        return Address(word[12:]) if kind == "address" else int.from_bytes(word)

    return read


@dataclass(frozen=True, slots=True)
class ChannelConfig(Struct):
    """What a channel is. Its digest is the channel's id, so every field is fixed for life."""

    TYPE: ClassVar[str] = (
        "ChannelConfig(address payer,address payerAuthorizer,address receiver,address receiverAuthorizer,"
        "address token,uint40 withdrawDelay,bytes32 salt)"
    )
    payer: Address
    """Cold owner of the vault balance; signs `Allocation`."""
    payer_authorizer: Address
    """Session key; signs `Voucher` and `Ask`."""
    receiver: Address
    """The worker's hot key; the payout address is looked up in the Workers contract when it settles."""
    receiver_authorizer: Address
    """Signs `Close` and `Receipt`; the hot key again, unless the operator separates them."""
    token: Address
    """ERC-20 of the channel; the zero address is the native coin."""
    withdraw_delay: int
    """Seconds between the payer's wish to withdraw and the money; the worker claims in between."""
    salt: Hash32

    def _encode(self) -> bytes:
        return (
            _address(self.payer)
            + _address(self.payer_authorizer)
            + _address(self.receiver)
            + _address(self.receiver_authorizer)
            + _address(self.token)
            + _uint(self.withdraw_delay, 40)
            + self.salt
        )

    def channel_id(self, domain: Domain) -> ChannelId:
        return ChannelId(self.digest(domain))


@dataclass(frozen=True, slots=True)
class Voucher(Struct):
    """The client's promise: the receiver may have claimed up to `cumulative` in this channel's life."""

    TYPE: ClassVar[str] = "Voucher(bytes32 channelId,uint128 maxClaimableAmount)"
    channel_id: ChannelId
    cumulative: int
    """Smallest unit of the channel's token, summed over all jobs; never falls."""

    def _encode(self) -> bytes:
        return self.channel_id + _uint(self.cumulative, 128)


@dataclass(frozen=True, slots=True)
class Allocation(Struct):
    """The payer's order to lock vault balance for one channel. Anyone may submit it."""

    TYPE: ClassVar[str] = "Allocation(bytes32 channelId,uint128 allocated,uint40 validBefore)"
    channel_id: ChannelId
    allocated: int
    """Cumulative total over the channel's life, so a replay changes nothing."""
    valid_before: int
    """Unix seconds of chain time."""

    def _encode(self) -> bytes:
        return self.channel_id + _uint(self.allocated, 128) + _uint(self.valid_before, 40)


@dataclass(frozen=True, slots=True)
class Close(Struct):
    """The worker's consent to end a channel at a final claimed total; the rest goes back at once."""

    TYPE: ClassVar[str] = "Close(bytes32 channelId,uint128 claimed)"
    channel_id: ChannelId
    claimed: int

    def _encode(self) -> bytes:
        return self.channel_id + _uint(self.claimed, 128)


@dataclass(frozen=True, slots=True)
class Ask(Struct):
    """The client's signed request: what is asked, of whom, under which offer, paid by which channel."""

    TYPE: ClassVar[str] = (
        "Ask(bytes32 jobId,uint32 part,bytes32 channelId,address worker,bytes32 modelId,bytes32 requestHash,"
        "bytes32 paramsHash,bytes32 offerHash,uint64 deadline)"
    )
    job_id: JobId
    part: int
    """0 for the first worker of a job; counts up when another one continues the stream."""
    channel_id: ChannelId
    worker: Address
    model_id: ModelId
    request_hash: Hash32
    params_hash: Hash32
    offer_hash: Hash32
    deadline: int
    """Unix milliseconds after which the client no longer wants tokens."""

    def _encode(self) -> bytes:
        return (
            self.job_id
            + _uint(self.part, 32)
            + self.channel_id
            + _address(self.worker)
            + self.model_id
            + self.request_hash
            + self.params_hash
            + self.offer_hash
            + _uint(self.deadline, 64)
        )


@dataclass(frozen=True, slots=True)
class Receipt(Struct):
    """The worker's signed result: what ran, what came out, what it costs. Unverifiable means unpaid."""

    TYPE: ClassVar[str] = (
        "Receipt(bytes32 jobId,uint32 part,bytes32 channelId,uint64 sequence,bytes32 modelId,bytes32 requestHash,"
        "bytes32 paramsHash,bytes32 outputDigest,uint32 inputTokens,uint32 outputTokens,uint128 cost,"
        "bytes32 commitment,uint64 started,uint64 finished,uint8 finishReason)"
    )
    job_id: JobId
    part: int
    channel_id: ChannelId
    sequence: int
    """Counts the receipts of a channel from 1; two different receipts with one number are proof of fraud."""
    model_id: ModelId
    request_hash: Hash32
    params_hash: Hash32
    output_digest: Hash32
    """`protocol.digest.OutputDigest` over token ids and text."""
    input_tokens: int
    output_tokens: int
    cost: int
    """Smallest unit of the channel's token."""
    commitment: Hash32
    """Root of the verification scheme's evidence; zero when the offer names no scheme."""
    started: int
    """Unix milliseconds by the worker's clock."""
    finished: int
    finish_reason: int
    """`protocol.messages.FinishReason`."""

    def _encode(self) -> bytes:
        return (
            self.job_id
            + _uint(self.part, 32)
            + self.channel_id
            + _uint(self.sequence, 64)
            + self.model_id
            + self.request_hash
            + self.params_hash
            + self.output_digest
            + _uint(self.input_tokens, 32)
            + _uint(self.output_tokens, 32)
            + _uint(self.cost, 128)
            + self.commitment
            + _uint(self.started, 64)
            + _uint(self.finished, 64)
            + _uint(self.finish_reason, 8)
        )


@dataclass(frozen=True, slots=True)
class Offer(Struct):
    """Signature frame of an offer document (`protocol.offers`). Domain: `MARKET_DOMAIN`, because one offer is for every chain
    that it names."""

    TYPE: ClassVar[str] = "Offer(address worker,bytes32 documentHash,uint64 issued,uint64 expires)"
    worker: Address
    document_hash: Hash32
    issued: int
    """Unix milliseconds."""
    expires: int

    def _encode(self) -> bytes:
        return _address(self.worker) + self.document_hash + _uint(self.issued, 64) + _uint(self.expires, 64)


@dataclass(frozen=True, slots=True)
class Refusal(Struct):
    """A worker's signed no, so that "why not" can be shown to others. Domain: `MARKET_DOMAIN`, because who asks on a channel that
    the worker does not know asks on no chain it could name."""

    TYPE: ClassVar[str] = "Refusal(bytes32 jobId,uint8 reason,uint64 at)"
    job_id: JobId
    reason: int
    """`protocol.errors.RefusalReason`."""
    at: int
    """Unix milliseconds."""

    def _encode(self) -> bytes:
        return self.job_id + _uint(self.reason, 8) + _uint(self.at, 64)


@dataclass(frozen=True, slots=True)
class Benchmark(Struct):
    """Signature frame of a benchmark document (`protocol.benchmark`): what this worker's device was measured to do. Domain:
    `MARKET_DOMAIN`, because it is a statement to everybody and moves nothing."""

    TYPE: ClassVar[str] = "Benchmark(address worker,bytes32 documentHash,bytes32 nonce,uint64 started,uint64 finished)"
    worker: Address
    document_hash: Hash32
    nonce: Hash32
    """What the measurement was seeded with: a verifier's number or the hash of a recent block, so that it cannot be older."""
    started: int
    """Unix milliseconds by the worker's clock."""
    finished: int

    def _encode(self) -> bytes:
        return (
            _address(self.worker) + self.document_hash + self.nonce + _uint(self.started, 64) + _uint(self.finished, 64)
        )


@dataclass(frozen=True, slots=True)
class HotKey(Struct):
    """A hot key's consent to be registered by an owner. Domain: the Workers contract."""

    TYPE: ClassVar[str] = "HotKey(address owner,address hotKey,address payout,uint256 nonce,uint40 deadline)"
    owner: Address
    hot_key: Address
    payout: Address
    nonce: int
    deadline: int
    """Unix seconds of chain time."""

    def _encode(self) -> bytes:
        return (
            _address(self.owner)
            + _address(self.hot_key)
            + _address(self.payout)
            + _uint(self.nonce, 256)
            + _uint(self.deadline, 40)
        )


@dataclass(frozen=True, slots=True)
class Quote(Struct):
    """A worker's terms for one batch job. Its digest is the job's id, so a job keeps the terms it was opened with.

    Domain of this struct and of `Order`, `Submission` and `Acceptance`: the Jobs contract.
    """

    TYPE: ClassVar[str] = (
        "Quote(bytes32 specHash,address client,address worker,address token,uint128 amount,uint128 penalty,"
        "uint40 validBefore,uint40 deadline,uint40 window,address resolver,bytes32 salt)"
    )
    spec_hash: Hash32
    """Content hash of the job's specification."""
    client: Address
    """Whose vault balance pays; signs `Order` and `Acceptance`."""
    worker: Address
    """The hot key that signs this quote and `Submission`."""
    token: Address
    """Of `amount` and `penalty`; the zero address is the native coin."""
    amount: int
    """The most that the job can cost; locked when it is opened."""
    penalty: int
    """Stake of the worker's owner that is held until the job ends."""
    valid_before: int
    """Unix seconds of chain time before which the job must be opened."""
    deadline: int
    """Unix seconds of chain time before which the result must be submitted."""
    window: int
    """Seconds after the submission in which the client may dispute."""
    resolver: Address
    """Contract that judges a dispute; the zero address when there is none."""
    salt: Hash32

    def _encode(self) -> bytes:
        return (
            self.spec_hash
            + _address(self.client)
            + _address(self.worker)
            + _address(self.token)
            + _uint(self.amount, 128)
            + _uint(self.penalty, 128)
            + _uint(self.valid_before, 40)
            + _uint(self.deadline, 40)
            + _uint(self.window, 40)
            + _address(self.resolver)
            + self.salt
        )

    def job_id(self, domain: Domain) -> JobId:
        return JobId(self.digest(domain))


@dataclass(frozen=True, slots=True)
class Order(Struct):
    """The client's consent to a quote: lock its amount. Anyone may open the job with both signatures."""

    TYPE: ClassVar[str] = "Order(bytes32 jobId)"
    job_id: JobId

    def _encode(self) -> bytes:
        return self.job_id


@dataclass(frozen=True, slots=True)
class Submission(Struct):
    """The worker's word: the result is there, and this is what it asks for it."""

    TYPE: ClassVar[str] = "Submission(bytes32 jobId,bytes32 resultHash,uint128 claimed)"
    job_id: JobId
    result_hash: Hash32
    """Content hash of the result."""
    claimed: int
    """At most the quote's amount, in its token."""

    def _encode(self) -> bytes:
        return self.job_id + self.result_hash + _uint(self.claimed, 128)


@dataclass(frozen=True, slots=True)
class Acceptance(Struct):
    """The client's word: pay this much for this result, now."""

    TYPE: ClassVar[str] = "Acceptance(bytes32 jobId,bytes32 resultHash,uint128 amount)"
    job_id: JobId
    result_hash: Hash32
    amount: int
    """The whole amount before the submission; after it at least what was claimed."""

    def _encode(self) -> bytes:
        return self.job_id + self.result_hash + _uint(self.amount, 128)


STRUCTS: Final = (
    ChannelConfig,
    Voucher,
    Allocation,
    Close,
    Ask,
    Receipt,
    Offer,
    Refusal,
    Benchmark,
    HotKey,
    Quote,
    Order,
    Submission,
    Acceptance,
)
"""Every struct that is signed or hashed; the vectors and the docs walk this list."""
