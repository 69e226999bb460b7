"""Transactions of one key: one nonce at a time, journaled before it is sent, decided by receipts.

Rules:
- One `TxSender` per key and chain. The lock is held from choosing a nonce until a node has taken the transaction, so there is
  never a gap, and a refused transaction gives its nonce back.
- Simulate first (`eth_estimateGas`): an expected revert costs no gas and names the contract's error.
- *Journal, then speak*: nonce, hash and raw bytes are journaled before they are sent. After a restart `resume` sends again
  what the node has not seen.
- What happened is read from receipts, by hash, over all attempts at that nonce. Error texts of a node decide nothing:
  "already known", "nonce too low" and a timeout all mean *look*.
- *One nonce, one call* (N4). A transaction that may be out keeps its nonce until it has landed, or until two looks apart agree
  that it can not; whatever its caller does, no other call gets the nonce. What waits too long is replaced by the same call with
  higher fees; what the nodes forgot is sent again.
- A transaction without an end stands before all that come later: the next `send` first takes up its wait, and when it is the
  same call (account, calldata, value) and its caller was told of a failure, its receipt is the answer. So a claim that is tried
  again is never paid for twice, and a stuck nonce collects no queue behind it.
- A landed transaction that a reorganisation throws out is sent again, unchanged. A call that was derived from the chain's state
  (`derived`) is not sent while such a one, or one without an end, is on its way: who looked did not see it, and would ask for the
  same a second time (N5). It is brought to its end instead, and the answer is `ChainMoved`: look again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio

from node.chain.eth import Eth
from node.chain.pending import (
    Answered,
    Call,
    History,
    Journal,
    PendingTx,
    answered,
    dropped,
    landed,
    no_journal,
    unfinished,
)
from node.chain.refused import Refused
from node.chain.rpc import Reverted, RpcError, RpcUnavailable
from node.chain.values import Receipt
from node.errors import ChainError, ChainMoved, RequestConflict, SignerRefused, TxTimeout
from node.ports import Signer, TxResult
from protocol.ids import Address
from protocol.transactions import Transaction

log = logging.getLogger(__name__)
ErrorName = Callable[[bytes], str]

GWEI = 10**9
RECENT = 64
"""How many transactions we could send again after a reorganisation."""


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


class _NonceTaken(Exception):
    """The nonce was used by a transaction that is not ours; take another one."""


class _Dropped(ChainError):
    """This call has not happened and will not: its nonce is another's, or no node takes it."""


@dataclass(slots=True)
class _Stalled:
    """A transaction that may be out, that has no end, and that nobody waits for."""

    attempts: list[PendingTx]
    answers_equal_calls: bool
    """Its caller was told of a failure and may try again. One that went away (cancelled) is not expected back: the next equal
    call is meant as another one."""


class TxSender:
    """Sends and follows the transactions of one account on one chain."""

    def __init__(
        self,
        eth: Eth,
        signer: Signer,
        chain_id: int,
        *,
        anchor: bytes = b"",
        journal: Journal = no_journal,
        error_name: ErrorName = lambda data: data[:4].hex(),
        policy: TxPolicy = DEFAULT_POLICY,
    ) -> None:
        """`anchor`: hash of an old block, by which a chain is told from another one with the same id (a devnet started anew)."""
        self._eth = eth
        self._signer = signer
        self._chain_id = chain_id
        self._anchor = anchor.hex()
        self._journal = journal
        self._error_name = error_name
        self._policy = policy
        self._lock = trio.Lock()
        self._recent: dict[int, PendingTx] = {}
        """By nonce: the last transactions that a node took."""
        self._ended: dict[int, bytes] = {}
        """By nonce: those of them that have landed, and the hash of the block."""
        self._stalled: dict[int, _Stalled] = {}
        """By nonce. Whatever is journaled without an end is in here, or some task waits for it."""
        self._answered: dict[str, Answered] = {}
        """By request id: what has been done already."""
        self._underway: dict[str, tuple[Call, trio.Event]] = {}
        """By request id: what is being done now."""
        self._refused = Refused()
        self._doubts: dict[int, float] = {}
        """By nonce: since when every look has said that the transaction can not land any more."""

    @property
    def account(self) -> Address:
        return self._signer.address

    async def send(
        self, purpose: str, to: Address, data: bytes, value: int = 0, *, derived: bool = False, request: str = ""
    ) -> TxResult:
        """Simulate, journal, send, wait for the receipt. A revert is a result with ``ok=False``, not an exception.

        `derived`: the call follows from what the chain shows. Raises `ChainMoved` when earlier transactions of ours changed that.
        `request`: an id of the caller's. A call that was asked for under it before is not sent again, restart or not: its
        result is the answer. Raises `RequestConflict` when the id was used for another call.
        """
        call = (to, data, value)
        if not request:
            return (await self._send(purpose, *call, derived, request))[0]
        await self._first_of(request, call, purpose)
        done = self._answered.get(request)
        if done is not None:
            if done.call != call:
                raise RequestConflict(
                    f"{purpose}: request {request!r} was used for another call", hint="a new request needs a new id"
                )
            return done.result
        mine = self._underway[request] = (call, trio.Event())
        try:
            return (await self._send(purpose, *call, derived, request))[0]
        finally:
            del self._underway[request]
            mine[1].set()

    async def _first_of(self, request: str, call: Call, purpose: str) -> None:
        """Return when nobody else is at this request. Raises `RequestConflict` when it is under way with another call."""
        while request in self._underway:
            theirs, over = self._underway[request]
            if theirs != call:
                break
            await over.wait()
        stalled = [one.attempts[0] for one in self._stalled.values()]
        if request in self._underway or {tx.call for tx in stalled if tx.request == request} - {call}:
            raise RequestConflict(f"{purpose}: request {request!r} is under way with another call")
        if self._refused.calls(request) - {call}:
            raise RequestConflict(
                f"{purpose}: request {request!r} was used for another call, which was refused and may be out all the same",
                hint="a new request needs a new id",
            )

    def has_answered(self, request: str) -> bool:
        """Whether a transaction that was asked for under this id has its end."""
        return request in self._answered

    async def create(self, purpose: str, initcode: bytes) -> tuple[TxResult, Address]:
        """Deploy a contract. Raises `ChainError` when it fails."""
        result, receipt = await self._send(purpose, None, initcode, 0, False, "")
        if receipt is None or not result.ok or receipt.created is None:
            raise ChainError(f"{purpose} failed: {result.error or 'no contract address in the receipt'}")
        return result, receipt.created

    async def resume(self, history: History) -> list[TxResult]:
        """Bring journaled transactions to their end after a restart; call it before the first `send`.

        What the nodes have not seen is sent again; what another transaction replaced, what every node refuses, and what was for
        another chain of the same id is journaled as dropped and left out of the answer. So is what does not land within
        `bump_after` seconds: the first `send` takes that up.
        """
        for tx in landed(history, self._chain_id, self._anchor, RECENT):
            self._keep(tx)
            self._ended[tx.signed.transaction.nonce] = b""
        self._answered |= answered(history, self._chain_id, self._anchor)
        self._refused.add(*dropped(history, self._chain_id, self._anchor, RECENT))
        by_nonce: dict[int, list[PendingTx]] = {}
        for tx in unfinished(history, self._chain_id):
            by_nonce.setdefault(tx.signed.transaction.nonce, []).append(tx)
        results = []
        async with self._lock:
            for nonce in sorted(by_nonce):
                attempts = by_nonce[nonce]
                doubtful = False
                if attempts[-1].anchor not in ("", self._anchor):
                    for attempt in attempts:
                        await self._drop(attempt, "it was for another chain of this id")
                    continue
                try:
                    if not await self._landed(attempts):
                        await self._broadcast(attempts[-1])
                except (_NonceTaken, RpcError):
                    doubtful = True  # it may have been out before: two looks decide
                limit = self._policy.bump_after * (2 if doubtful else 1)
                try:
                    result, _ = await self._wait(attempts, limit, push_now=doubtful)
                except (TxTimeout, _Dropped):
                    continue
                results.append(result)
            await self._take_back()
            for stalled in [one for one in self._stalled.values() if await self._landed(one.attempts)]:
                results.append((await self._wait(stalled.attempts))[0])
        return results

    async def fee(self) -> int:
        """What a transaction would pay now, wei per gas."""
        return min(await self._base_fee() + self._policy.tip, self._policy.max_fee)

    async def catch_up(self) -> None:
        """Bring what was sent before to its end: what timed out, and what a reorganisation threw out.

        Returns at once when there is nothing of the kind. Raises `TxTimeout` while one of them has no receipt.
        """
        async with self._lock:
            await self._take_up()
            _, orphans = await self._next_nonce()
            await self._bring_back(orphans)

    async def _bring_back(self, orphans: list[PendingTx]) -> None:
        for attempt in orphans:
            try:
                await self._wait([attempt], self._policy.bump_after)
            except _Dropped as error:
                log.warning("%s", error)

    # --------------------------------------------------------------------------------------------------------- sending

    async def _send(
        self, purpose: str, to: Address | None, data: bytes, value: int, derived: bool, request: str
    ) -> tuple[TxResult, Receipt | None]:
        async with self._lock:
            await self._take_back()
            stalled = bool(self._stalled)
            repeated = await self._take_up((to, data, value), request)
            if repeated is not None:
                return repeated
            nonce, orphans = await self._next_nonce()
            if orphans:
                await self._bring_back(orphans)
                nonce, _ = await self._next_nonce()
            if derived and (stalled or orphans):
                raise ChainMoved(f"{purpose}: earlier transactions had to be brought to their end first; look again")
            try:
                estimate = await self._eth.estimate_gas(to, data, sender=self.account, value=value)
            except Reverted as error:
                return TxResult(purpose, b"", 0, 0, False, self._error_name(error.data)), None
            gas = estimate + estimate * self._policy.gas_margin // 100
            for _ in range(3):
                try:
                    attempt = await self._sign_and_send(purpose, (to, data, value), gas, nonce, request)
                    break
                except _NonceTaken:
                    await self._take_back()
                    if (repeated := await self._take_up((to, data, value), request)) is not None:
                        return repeated
                    nonce, _ = await self._next_nonce()
            else:
                raise ChainError(
                    f"{purpose}: other transactions keep taking the nonces of {self.account}",
                    hint="is the same key used by another program?",
                )
        return await self._wait([attempt])

    async def _take_up(self, call: Call | None = None, request: str = "") -> tuple[TxResult, Receipt] | None:
        """Bring stalled transactions to their end, oldest first; the end of the one that is this very call, if any.

        Raises `TxTimeout` when one is still without a receipt after another `bump_after` seconds.
        """
        if self._stalled:
            # First what they stand on: an earlier one that a reorganisation threw out and nodes forgot.
            await self._next_nonce()
        for nonce in sorted(self._stalled):
            stalled = self._stalled[nonce]
            try:
                ended = await self._wait(stalled.attempts, self._policy.bump_after, push_now=True)
            except _Dropped:
                continue
            sent = next(attempt for attempt in stalled.attempts if attempt.signed.hash == ended[0].hash)
            # Under an id it is the id that says whether the caller means the same; a process that died can not come back for it.
            same = sent.request == request and (stalled.answers_equal_calls or bool(request))
            if same and sent.call == call:
                return ended
        return None

    async def _take_back(self) -> None:
        """What was refused and is out all the same is one of the stalled from here on."""
        back = await self._refused.back(self._eth, self.account, self._policy.bump_after, self._stalled.keys())
        for nonce, attempts in back.items():
            log.warning("%s was refused and is out all the same", attempts[0].purpose)
            self._stalled[nonce] = _Stalled(attempts, answers_equal_calls=True)

    async def _sign_and_send(self, purpose: str, call: Call, gas: int, nonce: int, request: str) -> PendingTx:
        to, data, value = call
        max_fee = min(2 * await self._base_fee() + self._policy.tip, self._policy.max_fee)
        transaction = Transaction(self._chain_id, nonce, min(self._policy.tip, max_fee), max_fee, gas, to, value, data)
        attempt = PendingTx(purpose, await self._signer.sign_transaction(transaction), self._anchor, request)
        await self._sign_down(attempt)
        # From here on it may be out, whatever ends this call.
        self._stalled[nonce] = _Stalled([attempt], answers_equal_calls=False)
        try:
            await self._broadcast(attempt)
        except _NonceTaken:
            await self._drop(attempt, "the nonce was used by another transaction")
            del self._stalled[nonce]
            raise
        except RpcError as error:
            # Refused while it is unknown and its nonce free: a later transaction will use the nonce, so at most one lands.
            await self._drop(attempt, str(error))
            del self._stalled[nonce]
            raise
        except ChainError:
            self._stalled[nonce].answers_equal_calls = True
            raise
        del self._stalled[nonce]
        self._keep(attempt)
        return attempt

    async def _sign_down(self, attempt: PendingTx) -> None:
        with trio.CancelScope(shield=True):  # a record that may be there or not would make its nonce nobody's
            await self._journal("tx_signed", bytes(self.account), attempt.to_body())

    def _keep(self, attempt: PendingTx) -> None:
        nonce = attempt.signed.transaction.nonce
        self._recent[nonce] = attempt
        for old in [known for known in self._recent if known <= nonce - RECENT]:
            self._forget(old)

    def _forget(self, nonce: int) -> None:
        self._recent.pop(nonce, None)
        self._ended.pop(nonce, None)

    async def _next_nonce(self) -> tuple[int, list[PendingTx]]:
        """Our next free nonce, and the orphans, oldest first: what had landed and is out of the chain again.

        What the nodes forgot of us is sent to them again on the way. A hole that a dropped transaction left is filled first.
        """
        pending = await self._eth.nonce(self.account, "pending")
        end = max(self._recent, default=-1) + 1
        free = max(pending, end)
        for nonce in range(pending, end):
            attempt = self._recent.get(nonce)
            if attempt is None:
                free = nonce
                break
            try:
                await self._broadcast(attempt)
            except (_NonceTaken, RpcError):
                continue  # it keeps its nonce until who waits for it has looked twice
        if not self._ended:
            return free, []
        count = await self._eth.nonce(self.account)
        return free, [self._recent[nonce] for nonce in sorted(self._ended) if count <= nonce < free]

    async def _base_fee(self) -> int:
        header = await self._eth.header("latest")
        if header is None:
            raise ChainError("the chain's node has no latest block")
        return header.base_fee

    async def _broadcast(self, attempt: PendingTx) -> None:
        """Return once a node has the transaction, or may have it and the nonce is used: then the receipt decides.

        Raises `RpcError` (refused, so not out), `_NonceTaken` (refused from the first try on) or `RpcUnavailable`.
        """
        maybe_out = False
        for remaining in range(4, -1, -1):
            try:
                await self._eth.send_raw(attempt.signed.raw)
                return
            except RpcError:
                if await self._eth.knows(attempt.signed.hash):
                    return
                if await self._eth.nonce(self.account) > attempt.signed.transaction.nonce:
                    # Asked again after the nonce: it may have landed between the two questions.
                    if maybe_out or await self._landed([attempt]):
                        return
                    raise _NonceTaken from None
                if maybe_out:
                    raise RpcUnavailable(f"{attempt.purpose}: refused, after a try whose answer was lost") from None
                raise
            except RpcUnavailable:
                maybe_out = True
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
        """Until there is a receipt, for `limit` seconds (`give_up_after` when None). A wait that ends otherwise leaves the
        transaction among the stalled, unless it is dropped."""
        nonce = attempts[0].signed.transaction.nonce
        try:
            ended = await self._watch(attempts, self._policy.give_up_after if limit is None else limit, push_now)
        except _Dropped:
            self._stalled.pop(nonce, None)
            raise
        except ChainError:
            self._stalled[nonce] = _Stalled(attempts, answers_equal_calls=True)
            raise
        except BaseException:
            self._stalled.setdefault(nonce, _Stalled(attempts, answers_equal_calls=False))
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
            if trio.current_time() >= patience:
                await self._push(attempts)
                patience = trio.current_time() + self._policy.bump_after
            if trio.current_time() - started > limit:
                raise TxTimeout(
                    f"{attempts[0].purpose}: no receipt after {limit:g} s",
                    hint=f"transaction 0x{attempts[-1].signed.hash.hex()} is journaled and may still land",
                )
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
        """The transaction is late: send it again when the nodes forgot it, else replace it with higher fees.

        Raises `_Dropped` when it can not land any more, as two looks `bump_after` apart agree: one alone may have met a node that
        is behind.
        """
        last = attempts[-1]
        nonce = last.signed.transaction.nonce
        try:
            if await self._landed(attempts):
                self._doubts.pop(nonce, None)
                return  # mined, only not confirmed yet
            if await self._eth.nonce(self.account) > nonce:
                await self._doubt(attempts, f"another transaction of {self.account} took nonce {nonce}")
                return
            if not await self._known(attempts):
                if not await self._send_again(attempts):
                    await self._doubt(attempts, "every node refuses it and none has it")
                    return
                self._doubts.pop(nonce, None)
                return
            self._doubts.pop(nonce, None)
            bumped = last.signed.transaction.bumped(await self._base_fee(), self._policy.max_fee)
            if bumped is None:
                return  # at the cap: keep waiting
            try:
                signed = await self._signer.sign_transaction(bumped)
            except SignerRefused as no:
                log.warning("%s waits at its fee: %s", last.purpose, no)
                return
            attempt = PendingTx(last.purpose, signed, self._anchor, last.request)
            await self._sign_down(attempt)
            attempts.append(attempt)
            await self._eth.send_raw(attempt.signed.raw)
        except (RpcError, RpcUnavailable):
            return  # whatever the node said, the receipt decides at the next look

    async def _known(self, attempts: list[PendingTx]) -> bool:
        for attempt in reversed(attempts):
            if await self._eth.knows(attempt.signed.hash):
                return True
        return False

    async def _send_again(self, attempts: list[PendingTx]) -> bool:
        """The dearest attempt that a node takes. False when every node refuses every one."""
        for attempt in reversed(attempts):
            try:
                await self._eth.send_raw(attempt.signed.raw)
                return True
            except RpcError:
                continue
        return False

    async def _doubt(self, attempts: list[PendingTx], why: str) -> None:
        nonce = attempts[0].signed.transaction.nonce
        since = self._doubts.setdefault(nonce, trio.current_time())
        if trio.current_time() - since < self._policy.bump_after:
            return
        del self._doubts[nonce]
        for attempt in attempts:
            await self._drop(attempt, why)
        raise _Dropped(f"{attempts[0].purpose}: {why}", hint="is the same key used by another program?")

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
        if self._ended.get(tx.nonce) != receipt.block_hash:  # else it is journaled already
            await self._journal("tx_final", bytes(self.account), body)
        self._doubts.pop(tx.nonce, None)
        self._refused.forget(tx.nonce)
        self._eth.expect(receipt.block_number + self._policy.confirmations)
        self._keep(winner)
        self._ended[tx.nonce] = receipt.block_hash
        result = TxResult(winner.purpose, receipt.hash, receipt.block_number, receipt.gas_used, receipt.ok, error)
        if winner.request:
            self._answered[winner.request] = Answered(winner.call, result)
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
        nonce = attempt.signed.transaction.nonce
        body = {"nonce": nonce, "hash": attempt.signed.hash.hex(), "reason": why}
        self._forget(nonce)  # its caller is told that it will not happen: it is never sent again
        self._refused.add(attempt)
        await self._journal("tx_dropped", bytes(self.account), body)
