"""A key without a policy and without a memory, for keys that own nothing: faucets, looks at a chain, tests. Never a node's own.

What it shares with the real signers is the port, so whoever takes a `Signer` can be tested without a table or a process.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from protocol.ids import Address, PeerId
from protocol.keys import PrivateKey
from protocol.signing import Signable
from protocol.transactions import SignedTransaction, Transaction
from protocol.typed_data import Domain


class Bare:
    """Implements `node.ports.Signer` on a key in hand."""

    def __init__(self, key: PrivateKey) -> None:
        self.key = key
        self.address: Address = key.address
        self.peer_id: PeerId = key.peer_id
        self.public_key = key.public_key
        self.failure: str | None = None

    async def sign(self, struct: Signable, domain: Domain) -> bytes:
        await trio.lowlevel.checkpoint()
        return self.key.sign(struct.digest(domain))  # type: ignore[call-arg]

    async def sign_all(self, asked: Sequence[tuple[Signable, Domain]]) -> list[bytes]:
        return [await self.sign(struct, domain) for struct, domain in asked]

    async def weigh(self, struct: Signable, domain: Domain) -> None:
        await trio.lowlevel.checkpoint()

    async def sign_transaction(self, transaction: Transaction) -> SignedTransaction:
        await trio.lowlevel.checkpoint()
        return transaction.signed(self.key.sign(transaction.digest()))

    def sign_identity(self, data: bytes) -> bytes:
        return self.key.sign_identity(data)

    def __repr__(self) -> str:
        return f"Bare({self.address})"
