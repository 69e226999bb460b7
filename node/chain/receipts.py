"""From a transaction that may be out to its receipt: waiting, sending again, replacing, giving up.

Rules
- What happened is read from receipts, by hash, over all attempts at that nonce. Error texts of a node decide nothing:
  "already known", "nonce too low" and a timeout all mean *look*.
- What waits too long is replaced by the same call with higher fees; what the nodes forgot is sent again.
- That a transaction can not land any more is believed after two looks some time apart: one alone may have met a node that is
  behind (N4).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from node.chain.eth import Eth
from node.chain.pending import PendingTx
from node.chain.rpc import Reverted, RpcError, RpcUnavailable
from node.chain.sent import Sent, Stalled
from node.chain.tx_policy import TxPolicy
from node.chain.values import Receipt
from node.errors import ChainError, SignerRefused, TxTimeout
from node.ports import Signer, TxResult
from protocol.transactions import Transaction

log = logging.getLogger(__name__)
ErrorName = Callable[[bytes], str]


class Dropped(ChainError):
    """This call has not happened and will not: its nonce is another's, or no node takes it."""


class Receipts:
    """Of the transactions of one account on one chain."""

    def __init__(self, eth: Eth, signer: Signer, sent: Sent, error_name: ErrorName, policy: TxPolicy) -> None:
        self._eth = eth
        self._signer = signer
        self._sent = sent
        self._error_name = error_name
        self._policy = policy
        self._doubts: dict[int, float] = {}
        """By nonce: since when every look has said that the transaction can not land any more."""

    async def wait(
        self, attempts: list[PendingTx], limit: float | None = None, *, push_now: bool = False
    ) -> tuple[TxResult, Receipt]:
        """Until there is a receipt, for `limit` seconds (`give_up_after` when None). A wait that ends otherwise leaves the
        transaction among the stalled, unless it is dropped."""
        nonce = attempts[0].signed.transaction.nonce
        try:
            ended = await self._watch(attempts, self._policy.give_up_after if limit is None else limit, push_now)
        except Dropped:
            self._sent.stalled.pop(nonce, None)
            raise
        except ChainError:
            self._sent.stalled[nonce] = Stalled(attempts, answers_equal_calls=True)
            raise
        except BaseException:
            self._sent.stalled.setdefault(nonce, Stalled(attempts, answers_equal_calls=False))
            raise
        self._sent.stalled.pop(nonce, None)
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

    async def of(self, attempts: list[PendingTx]) -> Receipt | None:
        """The receipt of whichever attempt has one, confirmed or not."""
        for attempt in reversed(attempts):
            receipt = await self._eth.receipt(attempt.signed.hash)
            if receipt is not None:
                return receipt
        return None

    async def _confirmed(self, attempts: list[PendingTx]) -> Receipt | None:
        try:
            receipt = await self.of(attempts)
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

        Raises `Dropped` when it can not land any more, as two looks `bump_after` apart agree: one alone may have met a node that
        is behind.
        """
        last = attempts[-1]
        nonce = last.signed.transaction.nonce
        try:
            if await self.of(attempts):
                self._doubts.pop(nonce, None)
                return  # mined, only not confirmed yet
            if await self._eth.nonce(self._signer.address) > nonce:
                await self._doubt(attempts, f"another transaction of {self._signer.address} took nonce {nonce}")
                return
            if not await self._known(attempts):
                if not await self._send_again(attempts):
                    await self._doubt(attempts, "every node refuses it and none has it")
                    return
                self._doubts.pop(nonce, None)
                return
            self._doubts.pop(nonce, None)
            bumped = last.signed.transaction.bumped(await self._eth.base_fee(), self._policy.max_fee)
            if bumped is None:
                return  # at the cap: keep waiting
            try:
                signed = await self._signer.sign_transaction(bumped)
            except SignerRefused as no:
                log.warning("%s waits at its fee: %s", last.purpose, no)
                return
            attempt = PendingTx(last.purpose, signed, self._sent.anchor, last.request)
            await self._sent.record(attempt)
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
            await self._sent.drop(attempt, why)
        raise Dropped(f"{attempts[0].purpose}: {why}", hint="is the same key used by another program?")

    async def _finish(self, attempts: list[PendingTx], receipt: Receipt) -> tuple[TxResult, Receipt]:
        winner = next(a for a in attempts if a.signed.hash == receipt.hash)
        tx = winner.signed.transaction
        error = "" if receipt.ok else await self._why(tx, receipt)
        result = await self._sent.end(winner, receipt, error)
        self._doubts.pop(tx.nonce, None)
        self._eth.expect(receipt.block_number + self._policy.confirmations)
        return result, receipt

    async def _why(self, tx: Transaction, receipt: Receipt) -> str:
        """Name of the error behind a failed receipt, by asking again at its block. Best effort, for people only."""
        try:
            await self._eth.eth_call(
                tx.to, tx.data, sender=self._signer.address, value=tx.value, block=hex(receipt.block_number)
            )
        except Reverted as error:
            return self._error_name(error.data)
        except ChainError:
            pass
        return "reverted"
