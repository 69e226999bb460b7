"""Transactions of one key: one nonce at a time, journaled before it is sent, decided by receipts.

What was sent is in `node.chain.sent`, how it comes to its end in `node.chain.receipts`; here is what is sent next, and when.

Rules:
- One `TxSender` per key and chain. The lock is held from choosing a nonce until a node has taken the transaction, so there is
  never a gap, and a refused transaction gives its nonce back.
- Simulate first (`eth_estimateGas`): an expected revert costs no gas and names the contract's error.
- *Journal, then speak*. After a restart `resume` sends again what the node has not seen.
- *One nonce, one call* (N4). A transaction that may be out keeps its nonce until it has landed, or until two looks apart agree
  that it can not; whatever its caller does, no other call gets the nonce.
- A transaction without an end stands before all that come later: the next `send` first takes up its wait, and when it is the
  same call (account, calldata, value) and its caller was told of a failure, its receipt is the answer. So a claim that is tried
  again is never paid for twice, and a stuck nonce collects no queue behind it.
- A landed transaction that a reorganisation throws out is sent again, unchanged. A call that was derived from the chain's state
  (`derived`) is not sent while such a one, or one without an end, is on its way: who looked did not see it, and would ask for the
  same a second time (N5). It is brought to its end instead, and the answer is `ChainMoved`: look again.
"""

from __future__ import annotations

import logging

import trio

from node.chain.eth import Eth
from node.chain.pending import Call, History, Journal, PendingTx, no_journal
from node.chain.receipts import Dropped, ErrorName, Receipts
from node.chain.rpc import Reverted, RpcError, RpcUnavailable
from node.chain.sent import Sent, Stalled
from node.chain.tx_policy import DEFAULT_POLICY, TxPolicy
from node.chain.values import Receipt
from node.errors import ChainError, ChainMoved, RequestConflict, TxTimeout
from node.ports import Signer, TxResult
from protocol.ids import Address
from protocol.transactions import Transaction

log = logging.getLogger(__name__)


class _NonceTaken(Exception):
    """The nonce was used by a transaction that is not ours; take another one."""


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
        self._policy = policy
        self._error_name = error_name
        self._sent = Sent(signer.address, chain_id, anchor, journal)
        self._receipts = Receipts(eth, signer, self._sent, error_name, policy)
        self._lock = trio.Lock()
        self._underway: dict[str, tuple[Call, trio.Event]] = {}
        """By request id: what is being done now."""

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
        done = self._sent.answered.get(request)
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
        stalled = [one.attempts[0] for one in self._sent.stalled.values()]
        if request in self._underway or {tx.call for tx in stalled if tx.request == request} - {call}:
            raise RequestConflict(f"{purpose}: request {request!r} is under way with another call")
        if self._sent.refused.calls(request) - {call}:
            raise RequestConflict(
                f"{purpose}: request {request!r} was used for another call, which was refused and may be out all the same",
                hint="a new request needs a new id",
            )

    def has_answered(self, request: str) -> bool:
        """Whether a transaction that was asked for under this id has its end."""
        return request in self._sent.answered

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
        by_nonce = self._sent.recall(history)
        results = []
        async with self._lock:
            for nonce in sorted(by_nonce):
                attempts = by_nonce[nonce]
                doubtful = False
                if attempts[-1].anchor not in ("", self._sent.anchor):
                    for attempt in attempts:
                        await self._sent.drop(attempt, "it was for another chain of this id")
                    continue
                try:
                    if not await self._receipts.of(attempts):
                        await self._broadcast(attempts[-1])
                except (_NonceTaken, RpcError):
                    doubtful = True  # it may have been out before: two looks decide
                limit = self._policy.bump_after * (2 if doubtful else 1)
                try:
                    result, _ = await self._receipts.wait(attempts, limit, push_now=doubtful)
                except (TxTimeout, Dropped):
                    continue
                results.append(result)
            await self._take_back()
            for stalled in [one for one in self._sent.stalled.values() if await self._receipts.of(one.attempts)]:
                results.append((await self._receipts.wait(stalled.attempts))[0])
        return results

    async def fee(self) -> int:
        """What a transaction would pay now, wei per gas."""
        return min(await self._eth.base_fee() + self._policy.tip, self._policy.max_fee)

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
                await self._receipts.wait([attempt], self._policy.bump_after)
            except Dropped as error:
                log.warning("%s", error)

    # --------------------------------------------------------------------------------------------------------- sending

    async def _send(
        self, purpose: str, to: Address | None, data: bytes, value: int, derived: bool, request: str
    ) -> tuple[TxResult, Receipt | None]:
        async with self._lock:
            await self._take_back()
            stalled = bool(self._sent.stalled)
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
        return await self._receipts.wait([attempt])

    async def _take_up(self, call: Call | None = None, request: str = "") -> tuple[TxResult, Receipt] | None:
        """Bring stalled transactions to their end, oldest first; the end of the one that is this very call, if any.

        Raises `TxTimeout` when one is still without a receipt after another `bump_after` seconds.
        """
        if self._sent.stalled:
            # First what they stand on: an earlier one that a reorganisation threw out and nodes forgot.
            await self._next_nonce()
        for nonce in sorted(self._sent.stalled):
            stalled = self._sent.stalled[nonce]
            try:
                ended = await self._receipts.wait(stalled.attempts, self._policy.bump_after, push_now=True)
            except Dropped:
                continue
            sent = next(attempt for attempt in stalled.attempts if attempt.signed.hash == ended[0].hash)
            # Under an id it is the id that says whether the caller means the same; a process that died can not come back for it.
            same = sent.request == request and (stalled.answers_equal_calls or bool(request))
            if same and sent.call == call:
                return ended
        return None

    async def _take_back(self) -> None:
        """What was refused and is out all the same is one of the stalled from here on."""
        back = await self._sent.refused.back(
            self._eth, self.account, self._policy.bump_after, self._sent.stalled.keys()
        )
        for nonce, attempts in back.items():
            log.warning("%s was refused and is out all the same", attempts[0].purpose)
            self._sent.stalled[nonce] = Stalled(attempts, answers_equal_calls=True)

    async def _sign_and_send(self, purpose: str, call: Call, gas: int, nonce: int, request: str) -> PendingTx:
        to, data, value = call
        max_fee = min(2 * await self._eth.base_fee() + self._policy.tip, self._policy.max_fee)
        transaction = Transaction(self._chain_id, nonce, min(self._policy.tip, max_fee), max_fee, gas, to, value, data)
        attempt = PendingTx(purpose, await self._signer.sign_transaction(transaction), self._sent.anchor, request)
        await self._sent.record(attempt)
        # From here on it may be out, whatever ends this call.
        self._sent.stalled[nonce] = Stalled([attempt], answers_equal_calls=False)
        try:
            await self._broadcast(attempt)
        except _NonceTaken:
            await self._sent.drop(attempt, "the nonce was used by another transaction")
            del self._sent.stalled[nonce]
            raise
        except RpcError as error:
            # Refused while it is unknown and its nonce free: a later transaction will use the nonce, so at most one lands.
            await self._sent.drop(attempt, str(error))
            del self._sent.stalled[nonce]
            raise
        except ChainError:
            self._sent.stalled[nonce].answers_equal_calls = True
            raise
        del self._sent.stalled[nonce]
        self._sent.keep(attempt)
        return attempt

    async def _next_nonce(self) -> tuple[int, list[PendingTx]]:
        """Our next free nonce, and the orphans, oldest first: what had landed and is out of the chain again.

        What the nodes forgot of us is sent to them again on the way. A hole that a dropped transaction left is filled first.
        """
        pending = await self._eth.nonce(self.account, "pending")
        end = max(self._sent.recent, default=-1) + 1
        free = max(pending, end)
        for nonce in range(pending, end):
            attempt = self._sent.recent.get(nonce)
            if attempt is None:
                free = nonce
                break
            try:
                await self._broadcast(attempt)
            except (_NonceTaken, RpcError):
                continue  # it keeps its nonce until who waits for it has looked twice
        if not self._sent.ended:
            return free, []
        count = await self._eth.nonce(self.account)
        return free, [self._sent.recent[nonce] for nonce in sorted(self._sent.ended) if count <= nonce < free]

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
                    if maybe_out or await self._receipts.of([attempt]):
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
