"""A simulated chain in this process: py-evm executes, this file keeps blocks, receipts and logs ready to be asked for.

One block per transaction, mined at once. Time is the machine's clock plus an offset that tests move. Nothing persists, nothing is
secured by anything: for tests and the demo only. Not safe for threads; the server in `embedded` holds a lock.

py-evm is used directly: eth-tester above it adds a second of work per hundred blocks, one fixed chain id and its own JSON forms.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from eth.abc import BlockHeaderAPI, ComputationAPI, SignedTransactionAPI
from eth.chains.base import MiningChain
from eth.consensus import ConsensusApplier, NoProofConsensus
from eth.constants import BLANK_ROOT_HASH, POST_MERGE_DIFFICULTY, POST_MERGE_MIX_HASH, POST_MERGE_NONCE
from eth.db.atomic import AtomicDB
from eth.exceptions import Revert, VMError
from eth.vm.forks import CancunVM
from eth.vm.spoof import SpoofTransaction
from eth_utils import ValidationError

# py-evm and py_ecc raise the limit of the whole process to 100,000 when they are imported. C code that recurses (a JSON
# parser over nested brackets) then runs off its stack, where Python would have raised RecursionError.
sys.setrecursionlimit(1000)
EVM_RECURSION: Final = 12_288
"""What py-evm asks for itself: calls nested 1,024 deep. Set by the process that runs nothing but the chain."""

CHAIN_ID: Final = 31338
"""One more than anvil's: a deployment of one simulated chain is refused on the other."""
GAS_LIMIT: Final = 30_000_000
_GWEI: Final = 10**9


class CallFailed(Exception):
    """A simulation failed; `data` is what a revert returned, None when the machine stopped for another reason."""

    def __init__(self, message: str, data: bytes | None) -> None:
        super().__init__(message)
        self.data = data


class Refused(Exception):
    """A transaction that no block can contain."""


@dataclass(frozen=True, slots=True)
class MinedTx:
    hash: bytes
    sender: bytes
    nonce: int
    to: bytes
    value: int
    data: bytes
    block: int
    gas_used: int
    gas_price: int
    ok: bool
    created: bytes | None
    logs: Sequence[tuple[bytes, tuple[bytes, ...], bytes]]
    """(address, topics, data) in order; the index in the block is the position."""


@dataclass(frozen=True, slots=True)
class Call:
    """A transaction that is only simulated."""

    sender: bytes
    to: bytes
    data: bytes
    value: int
    gas: int


class EvmChain:
    """Blocks 0..n of one simulated chain, every account of `funded` holding `wei`."""

    def __init__(self, funded: Sequence[bytes], wei: int, chain_id: int = CHAIN_ID) -> None:
        vms = ConsensusApplier(NoProofConsensus).amend_vm_configuration(((0, CancunVM),))

        class _Chain(MiningChain):
            vm_configuration = vms

            def create_header_from_parent(self, parent_header: Any, **params: Any) -> BlockHeaderAPI:
                return super().create_header_from_parent(parent_header, **{**params, "gas_limit": GAS_LIMIT})

        _Chain.chain_id = chain_id
        genesis = {
            "coinbase": bytes(20),
            "difficulty": POST_MERGE_DIFFICULTY,
            "extra_data": b"",
            "gas_limit": GAS_LIMIT,
            "mix_hash": POST_MERGE_MIX_HASH,
            "nonce": POST_MERGE_NONCE,
            "receipt_root": BLANK_ROOT_HASH,
            "timestamp": int(time.time()),
            "transaction_root": BLANK_ROOT_HASH,
        }
        state = {account: {"balance": wei, "nonce": 0, "code": b"", "storage": {}} for account in funded}
        self.chain_id = chain_id
        self._chain = _Chain.from_genesis(AtomicDB(), genesis, state)
        self.headers: list[BlockHeaderAPI] = [self._chain.get_canonical_block_header_by_number(0)]
        self.block_txs: list[list[MinedTx]] = [[]]
        self.number_of: dict[bytes, int] = {self.headers[0].hash: 0}
        self.txs: dict[bytes, MinedTx] = {}
        self.offset = 0
        """Seconds that chain time is ahead of the machine's clock."""

    @property
    def head(self) -> BlockHeaderAPI:
        return self.headers[-1]

    def state(self, block: int | None = None) -> Any:
        """Read-only state after `block`, the head by default."""
        header = self.head if block is None else self.headers[block]
        return self._chain.get_vm(at_header=header).state

    # --------------------------------------------------------------------------------------------------------- writing

    def send_raw(self, raw: bytes) -> bytes:
        """Execute a signed transaction and mine its block. Raises `Refused`."""
        try:
            tx = self._chain.get_vm().get_transaction_builder().decode(raw)
            sender = tx.sender
        except Exception as error:  # the decoders raise what they like at foreign bytes
            raise Refused(f"not a signed transaction: {error}") from error
        if tx.hash in self.txs:
            raise Refused("already known")
        if getattr(tx, "chain_id", self.chain_id) != self.chain_id:
            raise Refused(f"signed for another chain than {self.chain_id}")
        expected = self.state().get_nonce(sender)
        if tx.nonce != expected:
            raise Refused(f"nonce too {'low' if tx.nonce < expected else 'high'}: next is {expected}, got {tx.nonce}")
        self._set_time()
        before = self._chain.header
        try:
            _, receipt, computation = self._chain.apply_transaction(tx)
        except (ValidationError, VMError) as error:
            self._chain.header = before
            raise Refused(str(error)) from error
        self._mine([self._mined(tx, sender, receipt, computation)])
        return bytes(tx.hash)

    def mine(self) -> None:
        """Add an empty block."""
        self._set_time()
        self._mine([])

    def increase_time(self, seconds: int) -> int:
        """The next block comes at least `seconds` after the head. Many blocks in one second have put the head ahead."""
        self.offset = max(self.offset, self.head.timestamp - int(time.time())) + seconds
        return self.offset

    def rewind(self, number: int) -> None:
        """Forget every block after `number`: the next one is its child, on another branch than before."""
        for header in self.headers[number + 1 :]:
            del self.number_of[header.hash]
        for txs in self.block_txs[number + 1 :]:
            for tx in txs:
                del self.txs[tx.hash]
        del self.headers[number + 1 :], self.block_txs[number + 1 :]
        self._chain.header = self._chain.create_header_from_parent(self.head)

    def _set_time(self) -> None:
        now = int(time.time()) + self.offset
        self._chain.set_header_timestamp(max(now, self.head.timestamp + 1))
        # Fresh randomness for each block, before its calls run, as PREVRANDAO. It also keeps the blocks of two branches apart.
        if self._chain.header.mix_hash == POST_MERGE_MIX_HASH:
            self._chain.header = self._chain.header.copy(mix_hash=os.urandom(32))

    def _mine(self, txs: list[MinedTx]) -> None:
        header = self._chain.mine_block(mix_hash=self._chain.header.mix_hash).header
        self.number_of[header.hash] = header.block_number
        self.headers.append(header)
        self.block_txs.append(txs)
        for tx in txs:
            self.txs[tx.hash] = tx

    def _mined(self, tx: SignedTransactionAPI, sender: bytes, receipt: Any, computation: ComputationAPI) -> MinedTx:
        base_fee = self._chain.header.base_fee_per_gas
        tip = min(tx.max_priority_fee_per_gas, tx.max_fee_per_gas - base_fee)
        return MinedTx(
            hash=bytes(tx.hash),
            sender=bytes(sender),
            nonce=tx.nonce,
            to=bytes(tx.to),
            value=tx.value,
            data=bytes(tx.data),
            block=self._chain.header.block_number,
            gas_used=receipt.gas_used,
            gas_price=base_fee + tip,
            ok=not computation.is_error,
            created=None if tx.to else bytes(computation.msg.storage_address),
            logs=[
                (bytes(log.address), tuple(topic.to_bytes(32) for topic in log.topics), bytes(log.data))
                for log in receipt.logs
            ],
        )

    # --------------------------------------------------------------------------------------------------------- reading

    def call(self, call: Call, block: int | None = None) -> tuple[bytes, int]:
        """Simulate on top of `block` (the head by default): (returned data, gas limit that suffices)."""
        if block is None:
            self._set_time()
            vm = self._chain.get_vm()
        else:
            vm = self._chain.get_vm(at_header=self.headers[block])
        state = vm.state
        if call.value > state.get_balance(call.sender):
            raise CallFailed("insufficient funds for the value sent", None)
        snapshot = state.snapshot()
        try:
            state.set_balance(call.sender, 1 << 200)  # fees of a simulation are nobody's concern
            unsigned = vm.get_transaction_builder().new_unsigned_dynamic_fee_transaction(
                chain_id=self.chain_id,
                nonce=state.get_nonce(call.sender),
                max_priority_fee_per_gas=0,
                max_fee_per_gas=1000 * _GWEI,
                gas=call.gas,
                to=call.to,
                value=call.value,
                data=call.data,
                access_list=(),
            )
            computation = state.apply_transaction(SpoofTransaction(unsigned, from_=call.sender))
        except (ValidationError, VMError) as error:
            raise CallFailed(str(error), None) from error
        finally:
            state.revert(snapshot)
        if computation.is_error:
            error = computation.error
            if isinstance(error, Revert):
                raise CallFailed("execution reverted", bytes(computation.output))
            raise CallFailed(f"execution failed: {type(error).__name__}", None)
        used = call.gas - computation.get_gas_remaining()
        # 1/64 stays behind at each call level and refunds come after: some room over what was used makes it suffice.
        return bytes(computation.output), min(GAS_LIMIT, used + used // 16 + 5_000)

    def estimate(self, call: Call, block: int | None = None) -> int:
        """A gas limit that suffices, tried. What was used and some room is enough for most calls; one that wants more to be
        there than it uses (`Disputes.open`) gets the least that works, to a thirty-second part."""
        low = self.call(call, block)[1]
        if self._works(call, low, block):
            return low
        high = call.gas
        while high - low > high // 32:
            middle = (low + high) // 2
            if self._works(call, middle, block):
                high = middle
            else:
                low = middle
        return high

    def _works(self, call: Call, gas: int, block: int | None) -> bool:
        try:
            self.call(replace(call, gas=gas), block)
        except CallFailed:
            return False
        return True

    def logs(self, first: int, last: int, addresses: set[bytes], topic: bytes | None) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        for number in range(max(first, 0), min(last, len(self.headers) - 1) + 1):
            for tx in self.block_txs[number]:
                found += [
                    entry
                    for entry in self.tx_logs(tx)
                    if (not addresses or bytes.fromhex(entry["address"][2:]) in addresses)
                    and (topic is None or entry["topics"][:1] == ["0x" + topic.hex()])
                ]
        return found

    def tx_logs(self, tx: MinedTx) -> list[Mapping[str, Any]]:
        """Logs of a transaction in the JSON form of eth_getLogs."""
        block_hash = "0x" + self.headers[tx.block].hash.hex()
        return [
            {
                "address": "0x" + address.hex(),
                "topics": ["0x" + topic.hex() for topic in topics],
                "data": "0x" + data.hex(),
                "blockNumber": hex(tx.block),
                "blockHash": block_hash,
                "transactionHash": "0x" + tx.hash.hex(),
                "transactionIndex": "0x0",
                "logIndex": hex(index),
                "removed": False,
            }
            for index, (address, topics, data) in enumerate(tx.logs)
        ]
