"""`Signers`: the keys of a node, wherever they are held; `SigningKey`: one of them, the port that the rest of the node sees.

Rules
- A signature exists only when its marks are durable. An ask that is cancelled still waits a moment for its answer: with a signer
  that is well it ends in a signature or in an error, so that its caller knows what was signed.
- When the signer is gone, or does not answer in time, everything asked of it fails with `SignerFailed`, now and later; `failure`
  says why.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from node.errors import SignerFailed, SignerRefused
from protocol.ids import Address, PeerId, address_of
from protocol.signing import KeyRole, Mark, Signable, SigningReason, SigningRefused
from protocol.signing_history import Ahead, KnownChannel, KnownWord
from protocol.transactions import SignedTransaction, Transaction
from protocol.typed_data import Domain

Asked = tuple[KeyRole, Signable, Domain | None]
Answer = bytes | SignerRefused
NO_JOURNAL: Final = Mark(0, bytes(32))


class SigningKey:
    """One key. Implements `node.ports.Signer`."""

    def __init__(self, signers: Signers, role: KeyRole, public_key: bytes) -> None:
        self._signers = signers
        self._role = role
        self.public_key = public_key
        """Compressed, 33 bytes."""
        self.address: Address = address_of(public_key)
        self.peer_id: PeerId = PeerId.from_public_key(public_key)

    @property
    def failure(self) -> str | None:
        return self._signers.failure

    async def sign(self, struct: Signable, domain: Domain) -> bytes:
        (signature,) = await self.sign_all([(struct, domain)])
        return signature

    async def sign_all(self, asked: Sequence[tuple[Signable, Domain]]) -> list[bytes]:
        answers = await self._signers.ask([(self._role, struct, domain) for struct, domain in asked])
        return [_signature(answer) for answer in answers]

    async def weigh(self, struct: Signable, domain: Domain) -> None:
        await self._signers.weigh(self._role, struct, domain)

    async def sign_transaction(self, transaction: Transaction) -> SignedTransaction:
        (answer,) = await self._signers.ask([(self._role, transaction, None)])
        return transaction.signed(_signature(answer))

    def sign_identity(self, data: bytes) -> bytes:
        return self._signers.ask_identity(self._role, data)

    def __repr__(self) -> str:
        return f"SigningKey({self._role.value}, {self.address})"


class Signers(ABC):
    """Keys by role, behind one policy and one table."""

    def __init__(
        self, public_keys: Mapping[KeyRole, bytes], table: bytes, *, empty: bool, witness: Mark | None
    ) -> None:
        self.keys = {role: SigningKey(self, role, public) for role, public in public_keys.items()}
        self.table = table
        """Which table it is: 16 bytes."""
        self.empty = empty
        """Whether the table had nothing in it when it was opened."""
        self.witness = witness
        """The record that the journal must still hold."""

    def __getitem__(self, role: KeyRole) -> SigningKey:
        return self.keys[role]

    @property
    @abstractmethod
    def failure(self) -> str | None:
        """Why nothing is signed any more, or None."""

    @abstractmethod
    async def ask(self, asked: Sequence[Asked]) -> list[Answer]:
        """One answer per request, in order. Raises `SignerFailed`."""

    @abstractmethod
    async def weigh(self, role: KeyRole, struct: Signable, domain: Domain) -> None:
        """Whether this would be signed now. Leaves no mark. Raises `SignerRefused` when not, or `SignerFailed`."""

    @abstractmethod
    def ask_identity(self, role: KeyRole, data: bytes) -> bytes:
        """The signature of one of libp2p's messages, DER. Blocks, for a millisecond at most in the ordinary run of things.

        Raises `SignerRefused` or `SignerFailed`.
        """

    @abstractmethod
    async def meet(
        self,
        channels: Iterable[KnownChannel],
        head: Mark,
        *,
        adopting: bool,
        lost: bool = False,
        words: Sequence[KnownWord] = (),
        following: Follow,
    ) -> list[Ahead]:
        """Hold a journal against the table; from here on marks can be made. `following` gives the journal's last durable record.

        Raises `SignerOutdated`. `node.signer.journal.attach` does all of it.
        """


class Follow:
    """Where the journal is now. A class and not a function, so that what is not attached yet has one, too."""

    def head(self) -> Mark:
        """The last durable record."""
        return NO_JOURNAL


_HINTS: Final = {
    SigningReason.OVER_DAY: "client.day_limit and chain.day_fees set the limits; the day ends at midnight UTC",
    SigningReason.UNKNOWN_CHANNEL: "this channel was opened with another signer's table; open a new one",
    SigningReason.CALL: "the signer's policy lists the calls; money leaves the vault for your own account, or for --to",
}


def refused(no: SigningRefused) -> SignerRefused:
    """The policy's no as the node's error."""
    return SignerRefused(no.reason, no.detail, hint=_HINTS.get(no.reason, ""))


def _signature(answer: Answer) -> bytes:
    if isinstance(answer, SignerRefused):
        raise answer
    if not answer:
        raise SignerFailed("the signer answered without a signature")
    return answer
