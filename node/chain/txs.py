"""Transactions of one key: one nonce at a time, journaled before it is sent, decided by receipts.

Rules:
- One `TxSender` per key. The lock is held from choosing a nonce until the node has taken the transaction, so there is never
  a gap, and a refused transaction gives its nonce back.
- Simulate first (`eth_estimateGas`): an expected revert costs no gas and names the contract's error.
- *Journal, then speak*: nonce, hash and raw bytes are journaled before they are sent. After a restart `resume` sends again
  what the node has not seen.
- What happened is read from receipts, by hash, over all attempts at that nonce. Error texts of a node decide nothing:
  "already known", "nonce too low" and a timeout all mean *look*.
- A transaction that waits too long is replaced at the same nonce with higher fees; one that the node forgot is sent again,
  and so are the last ones when a reorganisation has thrown them out.
- One that has outlived the caller's patience (`TxTimeout`) stands before all that come later: the next `send` first takes up
  its wait, and when it is the same call (account, calldata, value), its receipt is the answer. So a claim that is tried
  again is never paid for twice, and a stuck nonce collects no queue behind it.

Journal records (kind, subject, body): ``tx_signed`` before each send, ``tx_final`` with the receipt, ``tx_dropped`` when the
nonce is known to be free or another's. Subject is the account, 20 bytes; amounts are decimal strings.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from node.chain.eth import Eth
from node.chain.rpc import Reverted, RpcError, RpcUnavailable
from node.chain.values import Receipt
from node.errors import ChainError, TxTimeout
from node.ports import TxResult
from protocol.errors import InvalidValue
from protocol.ids import Address
from protocol.keys import PrivateKey
from protocol.transactions import SignedTransaction, Transaction

Journal = Callable[[str, bytes, Mapping[str, Any]], Awaitable[None]]
ErrorName = Callable[[bytes], str]

GWEI = 10**9
RECENT = 64
"""How many transactions we could send again after a reorganisation."""


async def no_journal(kind: str, subject: bytes, body: Mapping[str, Any]) -> None:
    """For throw-away keys on simulated chains only: a crash forgets what was sent."""


@dataclass(frozen=True, slots=True)
class TxPolicy:
    """How patient and how generous we are. Times are seconds, fees are wei per gas."""

    poll: float = 1.0
    """Between two looks for a receipt; 0.01 on a simulated chain."""
    bump_after: float = 45.0
    """Without a receipt for so long, send again or replace with higher fees."""
    give_up_after: float = 900.0
    """Then `TxTimeout`; the transaction stays journaled and may still land."""
    confirmations: int = 0
    """Blocks on top of the receipt's before the result is believed."""
    gas_margin: int = 20
    """Percent over the estimate."""
    tip: int = GWEI
    max_fee: int = 1000 * GWEI
    """Never more than this, bumps included."""


DEFAULT_POLICY = TxPolicy()
DEVNET_POLICY = TxPolicy(poll=0.01, bump_after=5.0, give_up_after=60.0)


@dataclass(frozen=True, slots=True)
class PendingTx:
    """A journaled transaction without a final record."""

    purpose: str
    signed: SignedTransaction

    def to_body(self) -> dict[str, Any]:
        tx = self.signed.transaction
        return {
            "purpose": self.purpose,
            "chain_id": tx.chain_id,
            "nonce": tx.nonce,
            "tip": str(tx.tip),
            "max_fee": str(tx.max_fee),
            "gas": tx.gas,
            "to": "" if tx.to is None else str(tx.to),
            "value": str(tx.value),
            "data": tx.data.hex(),
            "hash": self.signed.hash.hex(),
            "raw": self.signed.raw.hex(),
        }

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> PendingTx:
        """Raises `ChainError` for a record that is not ours."""
        try:
            transaction = Transaction(
                chain_id=int(body["chain_id"]),
                nonce=int(body["nonce"]),
                tip=int(body["tip"]),
                max_fee=int(body["max_fee"]),
                gas=int(body["gas"]),
                to=Address(body["to"]) if body["to"] else None,
                value=int(body["value"]),
                data=bytes.fromhex(body["data"]),
            )
            signed = SignedTransaction(transaction, bytes.fromhex(body["raw"]), bytes.fromhex(body["hash"]))
            return cls(str(body["purpose"]), signed)
        except (KeyError, ValueError, TypeError, InvalidValue) as error:
            raise ChainError(f"the journal holds a damaged transaction record: {error}") from error


def unfinished(records: Iterable[tuple[str, Mapping[str, Any]]], chain_id: int) -> list[PendingTx]:
    """Fold one account's (kind, body) journal records, in order: what was signed for this chain and has no end yet.

    A journal may hold transactions of several chains, each with nonces of its own: an end counts where its hash was signed.
    """
    waiting: dict[str, PendingTx] = {}
    signed: set[str] = set()
    for kind, body in records:
        if kind == "tx_signed":
            tx = PendingTx.from_body(body)
            if tx.signed.transaction.chain_id == chain_id:
                signed.add(body["hash"])
                waiting[body["hash"]] = tx
        elif kind == "tx_final":
            if body["hash"] in signed:
                done = int(body["nonce"])
                waiting = {h: tx for h, tx in waiting.items() if tx.signed.transaction.nonce != done}
        elif kind == "tx_dropped":
            waiting.pop(body["hash"], None)
    return sorted(waiting.values(), key=lambda tx: tx.signed.transaction.nonce)


class _NonceTaken(Exception):
    """The nonce was used by a transaction that is not ours; take another one."""


class _NonceLost(ChainError):
    """While we waited, a transaction that is not ours used the nonce: this call has not happened and will not."""


class TxSender:
    """Sends and follows the transactions of `key` on one chain."""

    def __init__(
        self,
        eth: Eth,
        key: PrivateKey,
        chain_id: int,
        *,
        journal: Journal = no_journal,
        error_name: ErrorName = lambda data: data[:4].hex(),
        policy: TxPolicy = DEFAULT_POLICY,
    ) -> None:
        self._eth = eth
        self._key = key
        self._chain_id = chain_id
        self._journal = journal
        self._error_name = error_name
        self._policy = policy
        self._lock = trio.Lock()
        self._next: int | None = None
        """Next free nonce as far as we know; None means that only the node knows."""
        self._recent: dict[int, PendingTx] = {}
        self._stalled: dict[int, list[PendingTx]] = {}
        """By nonce: all attempts at a transaction that nobody waits for any more and that has no end."""

    @property
    def account(self) -> Address:
        return self._key.address

    async def send(self, purpose: str, to: Address, data: bytes, value: int = 0) -> TxResult:
        """Simulate, journal, send, wait for the receipt. A revert is a result with ``ok=False``, not an exception."""
        result, _ = await self._send(purpose, to, data, value)
        return result

    async def create(self, purpose: str, initcode: bytes) -> tuple[TxResult, Address]:
        """Deploy a contract. Raises `ChainError` when it fails."""
        result, receipt = await self._send(purpose, None, initcode, 0)
        if receipt is None or not result.ok or receipt.created is None:
            raise ChainError(f"{purpose} failed: {result.error or 'no contract address in the receipt'}")
        return result, receipt.created

    async def resume(self, pending: Iterable[PendingTx]) -> list[TxResult]:
        """Bring journaled transactions to their end after a restart; call it before the first `send`.

        `pending` comes from `unfinished`. What the node has not seen is sent again; what another transaction replaced is
        journaled as dropped and left out of the answer, and so is what does not land within `bump_after` seconds: the first
        `send` takes that up.
        """
        by_nonce: dict[int, list[PendingTx]] = {}
        for tx in pending:
            by_nonce.setdefault(tx.signed.transaction.nonce, []).append(tx)
        results = []
        async with self._lock:
            for nonce in sorted(by_nonce):
                attempts = by_nonce[nonce]
                if not await self._landed(attempts):
                    try:
                        await self._broadcast(attempts[-1])
                    except _NonceTaken:
                        for attempt in attempts:
                            await self._drop(attempt, "the nonce was used by another transaction")
                        continue
                try:
                    result, _ = await self._wait(attempts, self._policy.bump_after)
                except TxTimeout:
                    continue
                results.append(result)
            self._next = None
        return results

    # --------------------------------------------------------------------------------------------------------- sending

    async def _send(self, purpose: str, to: Address | None, data: bytes, value: int) -> tuple[TxResult, Receipt | None]:
        async with self._lock:
            repeated = await self._take_up(to, data, value)
            if repeated is not None:
                return repeated
            try:
                estimate = await self._eth.estimate_gas(to, data, sender=self.account, value=value)
            except Reverted as error:
                return TxResult(purpose, b"", 0, 0, False, self._error_name(error.data)), None
            gas = estimate + estimate * self._policy.gas_margin // 100
            for _ in range(3):
                try:
                    attempt = await self._sign_and_send(purpose, to, data, value, gas)
                    break
                except _NonceTaken:
                    continue
            else:
                raise ChainError(
                    f"{purpose}: other transactions keep taking the nonces of {self.account}",
                    hint="is the same key used by another program?",
                )
        return await self._wait([attempt])

    async def _take_up(self, to: Address | None, data: bytes, value: int) -> tuple[TxResult, Receipt] | None:
        """Bring stalled transactions to their end, oldest first; the end of the one that is this very call, if any.

        Raises `TxTimeout` when one is still without a receipt after another `bump_after` seconds.
        """
        for nonce in sorted(self._stalled):
            attempts = self._stalled[nonce]
            call = attempts[0].signed.transaction
            try:
                ended = await self._wait(attempts, self._policy.bump_after, push_now=True)
            except _NonceLost:
                continue
            if (call.to, call.data, call.value) == (to, data, value):
                return ended
        return None

    async def _sign_and_send(self, purpose: str, to: Address | None, data: bytes, value: int, gas: int) -> PendingTx:
        nonce = await self._next_nonce()
        self._next = None  # unknown until the node has taken this one, whatever ends this call
        max_fee = min(2 * await self._base_fee() + self._policy.tip, self._policy.max_fee)
        transaction = Transaction(self._chain_id, nonce, min(self._policy.tip, max_fee), max_fee, gas, to, value, data)
        attempt = PendingTx(purpose, transaction.signed(self._key.sign(transaction.digest())))
        await self._journal("tx_signed", bytes(self.account), attempt.to_body())
        try:
            await self._broadcast(attempt)
        except _NonceTaken:
            await self._drop(attempt, "the nonce was used by another transaction")
            raise
        except RpcError as error:
            # Refused while it is unknown and its nonce free: a later transaction will use the nonce, so at most one lands.
            await self._drop(attempt, str(error))
            raise
        self._next = nonce + 1
        self._recent[nonce] = attempt
        self._recent.pop(nonce - RECENT, None)
        return attempt

    async def _next_nonce(self) -> int:
        """The node's count of our transactions, after sending again what a reorganisation may have thrown out."""
        pending = await self._eth.nonce(self.account, "pending")
        if self._next is None or pending >= self._next:
            return pending
        for nonce in range(pending, self._next):
            lost = self._recent.get(nonce)
            if lost is None:
                return nonce
            try:
                await self._broadcast(lost)
            except _NonceTaken:
                continue
            except RpcError:
                return nonce  # no longer good for this branch: its nonce is free
        return self._next

    async def _base_fee(self) -> int:
        header = await self._eth.header("latest")
        if header is None:
            raise ChainError("the chain's node has no latest block")
        return header.base_fee

    async def _broadcast(self, attempt: PendingTx) -> None:
        """Return once the node has the transaction. Raises `RpcError` (refused), `_NonceTaken` or `RpcUnavailable`."""
        tries = 5
        for remaining in range(tries - 1, -1, -1):
            try:
                await self._eth.send_raw(attempt.signed.raw)
                return
            except RpcError:
                if await self._eth.knows(attempt.signed.hash):
                    return
                if await self._eth.nonce(self.account) > attempt.signed.transaction.nonce:
                    # Asked again after the nonce: it may have landed between the two questions.
                    if await self._landed([attempt]):
                        return
                    raise _NonceTaken from None
                raise
            except RpcUnavailable:
                if not remaining:
                    raise
                await trio.sleep(self._policy.poll)
                try:
                    if await self._eth.knows(attempt.signed.hash):
                        return
                except RpcUnavailable:
                    pass

    # --------------------------------------------------------------------------------------------------------- waiting

    async def _wait(
        self, attempts: list[PendingTx], limit: float | None = None, *, push_now: bool = False
    ) -> tuple[TxResult, Receipt]:
        """Until there is a receipt, for `limit` seconds (`give_up_after` when None). A wait that fails
        otherwise leaves the transaction among the stalled. A cancelled one does not: its caller may be gone for good, and the
        next equal call is then meant as another one."""
        nonce = attempts[0].signed.transaction.nonce
        try:
            ended = await self._watch(attempts, self._policy.give_up_after if limit is None else limit, push_now)
        except _NonceLost:
            self._stalled.pop(nonce, None)
            raise
        except ChainError:
            self._stalled[nonce] = attempts
            raise
        self._stalled.pop(nonce, None)
        return ended

    async def _watch(self, attempts: list[PendingTx], limit: float, push_now: bool) -> tuple[TxResult, Receipt]:
        started = trio.current_time()
        patience = started + (0 if push_now else self._policy.bump_after)
        while True:
            receipt = await self._confirmed(attempts)
            if receipt is not None:
                return await self._finish(attempts, receipt)
            now = trio.current_time()
            if now - started > limit:
                raise TxTimeout(
                    f"{attempts[0].purpose}: no receipt after {limit:g} s",
                    hint=f"transaction 0x{attempts[-1].signed.hash.hex()} is journaled and may still land",
                )
            if now >= patience:
                await self._push(attempts)
                patience = trio.current_time() + self._policy.bump_after
            await trio.sleep(self._policy.poll)

    async def _landed(self, attempts: list[PendingTx]) -> Receipt | None:
        for attempt in reversed(attempts):
            receipt = await self._eth.receipt(attempt.signed.hash)
            if receipt is not None:
                return receipt
        return None

    async def _confirmed(self, attempts: list[PendingTx]) -> Receipt | None:
        try:
            receipt = await self._landed(attempts)
            if receipt is None or not self._policy.confirmations:
                return receipt
            head = await self._eth.header("latest")
        except RpcUnavailable:  # the node may come back; give_up_after bounds the wait
            return None
        if head is None or head.number - receipt.block_number < self._policy.confirmations:
            return None
        return receipt

    async def _push(self, attempts: list[PendingTx]) -> None:
        """The transaction is late: send it again when the node forgot it, else replace it with higher fees."""
        last = attempts[-1]
        try:
            if await self._landed(attempts):
                return  # mined, only not confirmed yet
            if await self._eth.nonce(self.account) > last.signed.transaction.nonce and not await self._landed(attempts):
                for attempt in attempts:
                    await self._drop(attempt, "the nonce was used by another transaction")
                self._next = None
                raise _NonceLost(
                    f"{last.purpose}: another transaction of {self.account} took nonce {last.signed.transaction.nonce}",
                    hint="is the same key used by another program?",
                )
            if not await self._eth.knows(last.signed.hash):
                await self._eth.send_raw(last.signed.raw)
                return
            bumped = last.signed.transaction.bumped(await self._base_fee(), self._policy.max_fee)
            if bumped is None:
                return  # at the cap: keep waiting
            attempt = PendingTx(last.purpose, bumped.signed(self._key.sign(bumped.digest())))
            await self._journal("tx_signed", bytes(self.account), attempt.to_body())
            attempts.append(attempt)
            await self._eth.send_raw(attempt.signed.raw)
        except (RpcError, RpcUnavailable):
            return  # whatever the node said, the receipt decides at the next look

    async def _finish(self, attempts: list[PendingTx], receipt: Receipt) -> tuple[TxResult, Receipt]:
        winner = next(a for a in attempts if a.signed.hash == receipt.hash)
        tx = winner.signed.transaction
        error = "" if receipt.ok else await self._why(tx, receipt)
        body = {
            "purpose": winner.purpose,
            "nonce": tx.nonce,
            "hash": receipt.hash.hex(),
            "block": receipt.block_number,
            "gas_used": receipt.gas_used,
            "ok": receipt.ok,
            "error": error,
        }
        await self._journal("tx_final", bytes(self.account), body)
        result = TxResult(winner.purpose, receipt.hash, receipt.block_number, receipt.gas_used, receipt.ok, error)
        return result, receipt

    async def _why(self, tx: Transaction, receipt: Receipt) -> str:
        """Name of the error behind a failed receipt, by asking again at its block. Best effort, for people only."""
        try:
            await self._eth.eth_call(
                tx.to, tx.data, sender=self.account, value=tx.value, block=hex(receipt.block_number)
            )
        except Reverted as error:
            return self._error_name(error.data)
        except ChainError:
            pass
        return "reverted"

    async def _drop(self, attempt: PendingTx, why: str) -> None:
        body = {"nonce": attempt.signed.transaction.nonce, "hash": attempt.signed.hash.hex(), "reason": why}
        await self._journal("tx_dropped", bytes(self.account), body)
