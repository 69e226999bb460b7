"""An EVM in this process (pyrevm) that runs the shipped contract bytecode: a test engine, not a node.

No transactions, blocks or RPC: a call happens at once, at the time and by the sender that the test says. Reverts are
raised as `Reverted` with the Solidity error's name and values, decoded by selector from the ABIs of all contracts,
because an error may come from a contract further down (Channels -> Vault).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from eth_abi.abi import decode, encode

from protocol.ids import Address, keccak256
from protocol.transactions import rlp

ARTIFACTS = Path(__file__).resolve().parent.parent / "chain" / "abi"
_BUILT_IN = {
    keccak256(b"Error(string)")[:4]: ("Error", ["string"]),
    keccak256(b"Panic(uint256)")[:4]: ("Panic", ["uint256"]),
}
_HISTORY = Address(bytes.fromhex("0000f90827f1c53a10cb7a02335b175320002935"))
"""EIP-2935: the contract that keeps hashes of the last 8,191 blocks."""
_HISTORY_CODE = bytes.fromhex("5f35545f5260205ff3")
"""Returns the storage slot of the number it is asked for, where `show_header` puts a hash."""
_READER = Address(b"\x01" * 20)
"""Sender of view calls: an account with code may not send (EIP-3607), and it is never party to anything."""
_OUTPUT = re.compile(r"output: 0x([0-9a-f]*)")


class Reverted(Exception):
    """The call reverted; nothing changed."""

    def __init__(self, name: str, values: tuple[Any, ...] = (), data: bytes = b"") -> None:
        super().__init__(f"{name}{values}")
        self.name = name
        """Solidity error name, "" for an empty revert, "Halt" when the machine stopped (out of gas, bad opcode)."""
        self.values = values
        self.data = data


@dataclass(frozen=True)
class Result:
    """What one successful call gave."""

    value: Any
    """Decoded return value: None, one value, or a tuple."""
    events: tuple[tuple[str, dict[str, Any]], ...]
    """(event name, its fields) of every known event, in order, from all contracts."""


def _plain(value: Any) -> Any:
    """Addresses as `Address`, at any depth."""
    if isinstance(value, str) and len(value) == 42 and value.startswith("0x"):
        return Address(value)
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value


def _decode(types: list[str], data: bytes) -> tuple[Any, ...]:
    return tuple(map(_plain, decode(types, data)))


def _type(parameter: Mapping[str, Any]) -> str:
    kind: str = parameter["type"]
    if not kind.startswith("tuple"):
        return kind
    return "(" + ",".join(_type(c) for c in parameter["components"]) + ")" + kind[5:]


def _types(parameters: list[dict[str, Any]]) -> list[str]:
    return [_type(p) for p in parameters]


@cache
def _hashed(signature: str) -> bytes:
    return keccak256(signature.encode())


def _selector(entry: Mapping[str, Any]) -> bytes:
    return _hashed(f"{entry['name']}({','.join(_types(entry['inputs']))})")


@cache
def artifact(path: Path) -> tuple[list[dict[str, Any]], bytes]:
    """(abi, creation bytecode) of an artifact, parsed once: fuzz runs deploy the same ones thousands of times."""
    read = json.loads(path.read_text())
    return read["abi"], bytes.fromhex(read["bytecode"][2:])


class Evm:
    """One chain in memory. Times are Unix seconds; amounts the smallest unit."""

    def __init__(self, artifacts: Path = ARTIFACTS, chain_id: int = 31337, now: int = 1_800_000_000) -> None:
        import pyrevm  # optional: only tests need it

        self._pyrevm = pyrevm
        self._evm = pyrevm.EVM(env=pyrevm.Env(cfg=pyrevm.CfgEnv(chain_id=chain_id)))
        self._errors: dict[bytes, tuple[str, list[str]]] = dict(_BUILT_IN)
        self._events: dict[bytes, dict[str, Any]] = {}
        self.artifacts = artifacts
        self.gas_limit = 30_000_000
        """Gas of one call. Never unbounded: a hostile contract may loop until it is used up."""
        self.chain_id = chain_id
        self.now = now
        self.block = 1
        """Number of the block that calls run in. It moves by `set_block` only: many calls may share a block."""
        self.set_time(now)
        self.insert_code(_HISTORY, _HISTORY_CODE)

    def set_time(self, now: int) -> None:
        self.now = now
        self.set_randao(keccak256(b"gristmill randao %d" % self.block))

    def set_randao(self, randao: bytes) -> None:
        """PREVRANDAO of this block, as the opcode reads it, until the block or the time is set again."""
        self._evm.set_block_env(self._pyrevm.BlockEnv(number=self.block, timestamp=self.now, prevrandao=randao))

    def set_block(self, number: int, now: int | None = None) -> None:
        self.block = number
        self.set_time(self.now if now is None else now)

    def show_header(self, number: int, randao: bytes) -> bytes:
        """RLP of a header of block `number` with this PREVRANDAO, and from now on that block's hash is the header's.

        Only for blocks more than 256 back: nearer ones have the hash that pyrevm makes up.
        """
        if not 0 < self.block - number <= 8191 or self.block - number <= 256:
            raise ValueError(f"block {number} is not 257 to 8,191 blocks before block {self.block}")
        fields: list[bytes | int] = [bytes(32), bytes(32), bytes(20), *([bytes(32)] * 3), bytes(256), 0, number]
        header = rlp([*fields, self.gas_limit, 0, self.now, b"gristmill", randao, bytes(8), 7])
        self._evm.insert_account_storage("0x" + _HISTORY.hex(), number, int.from_bytes(keccak256(header)))
        return header

    def give(self, account: Address, amount: int) -> None:
        """Set the native balance of `account`."""
        self._evm.set_balance("0x" + account.hex(), amount)

    def native_balance(self, account: Address) -> int:
        return int(self._evm.get_balance("0x" + account.hex()))

    def deploy(self, name: str, *args: Any, sender: Address) -> Contract:
        """Deploy the shipped artifact `name`. Raises `Reverted`."""
        return self.deploy_code(*artifact(self.artifacts / f"{name}.json"), *args, sender=sender)

    def deploy_code(self, abi: list[dict[str, Any]], code: bytes, *args: Any, sender: Address) -> Contract:
        for entry in abi:
            if entry["type"] == "error":
                self._errors[_selector(entry)[:4]] = (entry["name"], _types(entry["inputs"]))
            elif entry["type"] == "event":
                self._events[_selector(entry)] = entry
        inputs: list[dict[str, Any]] = next((e["inputs"] for e in abi if e["type"] == "constructor"), [])
        try:
            address = self._evm.deploy("0x" + sender.hex(), code + encode(_types(inputs), args))
        except RuntimeError as error:
            raise self._reverted(error) from None
        return Contract(self, Address(address), abi)

    def insert_code(self, account: Address, code: bytes) -> None:
        """Put runtime bytecode at an address, for small hand-made contracts."""
        self._evm.insert_account_info("0x" + account.hex(), self._pyrevm.AccountInfo(code=code))

    @contextmanager
    def undone(self) -> Iterator[None]:
        """What happens inside is forgotten at the end."""
        checkpoint = self._evm.snapshot()
        try:
            yield
        finally:
            self._evm.revert(checkpoint)

    def transact(self, sender: Address, to: Address, data: bytes, value: int = 0) -> tuple[bytes, list[Any]]:
        """One raw call: (output, logs). Gas is not reported: storage stays warm here between calls, on a chain not."""
        try:
            output = self._evm.message_call("0x" + sender.hex(), "0x" + to.hex(), data, value=value, gas=self.gas_limit)
        except RuntimeError as error:
            raise self._reverted(error) from None
        result = self._evm.result
        return output, result.logs if result else []

    def decode_events(self, logs: list[Any]) -> tuple[tuple[str, dict[str, Any]], ...]:
        found = []
        for log in logs:
            topics = [bytes.fromhex(t[2:]) for t in log.topics]
            entry = self._events.get(topics[0]) if topics else None
            if entry is None:
                continue
            indexed = [p for p in entry["inputs"] if p["indexed"]]
            plain = [p for p in entry["inputs"] if not p["indexed"]]
            values = dict(zip((p["name"] for p in plain), _decode(_types(plain), log.data[1]), strict=True))
            for parameter, topic in zip(indexed, topics[1:], strict=True):
                values[parameter["name"]] = _decode([_type(parameter)], topic)[0]
            found.append((entry["name"], values))
        return tuple(found)

    def _reverted(self, error: RuntimeError) -> Reverted:
        text = str(error)
        match = _OUTPUT.search(text)
        if match is None:
            return Reverted("Halt", (text,))
        data = bytes.fromhex(match[1])
        name, types = self._errors.get(data[:4], ("", []))
        return Reverted(name, _decode(types, data[4:]) if name else (), data)


class Contract:
    """A deployed contract, called by function name with Python values (addresses as `Address`)."""

    def __init__(self, evm: Evm, address: Address, abi: list[dict[str, Any]]) -> None:
        self.evm = evm
        self.address = address
        self._functions = {
            entry["name"]: (_selector(entry)[:4], _types(entry["inputs"]), _types(entry["outputs"]))
            for entry in abi
            if entry["type"] == "function"
        }

    @property
    def functions(self) -> frozenset[str]:
        return frozenset(self._functions)

    def signature(self, function: str) -> tuple[bytes, list[str], list[str]]:
        """(selector, types of the arguments, types of what it returns)"""
        return self._functions[function]

    def encode(self, function: str, *args: Any) -> bytes:
        selector, inputs, _ = self._functions[function]
        return selector + encode(inputs, args)

    def call(self, function: str, *args: Any, sender: Address | None = None) -> Any:
        """Return value of a view function. Raises `Reverted`."""
        return self.send(sender or _READER, function, *args).value

    def send(self, sender: Address, function: str, *args: Any, value: int = 0, via: Address | None = None) -> Result:
        """A state-changing call. Raises `Reverted`. `via`: a contract that passes it on (`contracts.PUPPET`)."""
        data = self.encode(function, *args)
        if via is None:
            output, logs = self.evm.transact(sender, self.address, data, value)
        else:
            output, logs = self.evm.transact(sender, via, bytes(12) + self.address + data, value)
        values = _decode(self._functions[function][2], output)
        plain = None if not values else values[0] if len(values) == 1 else values
        return Result(plain, self.evm.decode_events(logs))
