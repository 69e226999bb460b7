"""Our contracts as shipped: ABI, bytecode, and the codec built from them.

The JSON files in `abi/` are made by contracts/build.mjs and belong to the wheel. Everything that Python knows of a contract
comes from them: selectors, event topics, error names. A call is encoded and a log decoded by table, without contract objects.

Source: Solidity contract ABI specification; encoding itself is eth-abi's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Final

import msgspec
from eth_abi.abi import decode as abi_decode
from eth_abi.abi import encode as abi_encode
from eth_abi.exceptions import DecodingError, EncodingError, ParseError

from node.chain.values import Log
from node.errors import ChainError
from node.ports import ChainEvent
from protocol.ids import Address, ChannelId, keccak256
from protocol.typed_data import ChannelConfig

_ERROR_STRING: Final = keccak256(b"Error(string)")[:4]
_PANIC: Final = keccak256(b"Panic(uint256)")[:4]


def _type_of(item: Mapping[str, Any]) -> str:
    """Canonical type: structs become tuples of their fields."""
    kind: str = item["type"]
    if not kind.startswith("tuple"):
        return kind
    return "(" + ",".join(_type_of(part) for part in item["components"]) + ")" + kind[len("tuple") :]


def _typed(item: Mapping[str, Any], value: Any) -> Any:
    """An eth-abi value as ours: addresses, channel ids and channel configs get their own types."""
    kind: str = item["type"]
    if kind.endswith("]"):
        inner = {**item, "type": kind[: kind.rindex("[")]}
        return tuple(_typed(inner, element) for element in value)
    if kind == "address":
        return Address(bytes.fromhex(value[2:]))
    if kind == "bytes32" and item.get("name") == "channelId":
        return ChannelId(value)
    if kind == "tuple":
        parts = tuple(_typed(part, element) for part, element in zip(item["components"], value, strict=True))
        return ChannelConfig(*parts) if str(item.get("internalType", "")).endswith(".ChannelConfig") else parts
    return value


@dataclass(frozen=True, slots=True)
class _Function:
    selector: bytes
    inputs: tuple[str, ...]
    outputs: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class _Event:
    name: str
    inputs: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Contract:
    """One artifact with its lookup tables."""

    name: str
    abi: Sequence[Mapping[str, Any]] = field(repr=False)
    bytecode: bytes = field(repr=False)
    runtime: bytes = field(repr=False)
    """Runtime code with zeros where immutables go."""
    immutables: tuple[tuple[int, int], ...] = field(repr=False)
    """(start, length) of each place that the constructor fills in `runtime`."""
    functions: Mapping[str, _Function] = field(repr=False, default_factory=dict)
    events: Mapping[bytes, _Event] = field(repr=False, default_factory=dict)
    errors: Mapping[bytes, str] = field(repr=False, default_factory=dict)

    def encode(self, function: str, *args: Any) -> bytes:
        """Calldata. Raises `ChainError` when the arguments do not fit the ABI: our mistake, not the chain's."""
        entry = self.functions[function]
        try:
            return entry.selector + abi_encode(entry.inputs, args)
        except (EncodingError, ParseError, TypeError, ValueError) as error:
            raise ChainError(f"{self.name}.{function}: arguments do not fit: {error}") from error

    def decode(self, function: str, data: bytes) -> tuple[Any, ...]:
        """What a call returned. Raises `ChainError` when the bytes are no answer of this function."""
        outputs = self.functions[function].outputs
        try:
            values = abi_decode([_type_of(item) for item in outputs], data)
        except (DecodingError, OverflowError, UnicodeDecodeError) as error:
            raise ChainError(f"{self.name}.{function} answered with bytes that are not its result") from error
        return tuple(_typed(item, value) for item, value in zip(outputs, values, strict=True))

    def topic(self, event: str) -> bytes:
        """First topic of the logs of this event."""
        return next(topic for topic, entry in self.events.items() if entry.name == event)

    def initcode(self, *args: Any) -> bytes:
        constructor = next((item for item in self.abi if item["type"] == "constructor"), None)
        kinds = [] if constructor is None else [_type_of(item) for item in constructor["inputs"]]
        return self.bytecode + abi_encode(kinds, args)

    def is_runtime(self, code: bytes) -> bool:
        """Whether `code` is this contract, whatever its immutables hold."""
        if len(code) != len(self.runtime):
            return False
        masked = bytearray(code)
        for start, length in self.immutables:
            masked[start : start + length] = bytes(length)
        return bytes(masked) == self.runtime


class _Reference(msgspec.Struct):
    start: int
    length: int


class _Artifact(msgspec.Struct):
    contractName: str
    abi: list[dict[str, Any]]
    bytecode: str
    deployedBytecode: str
    immutableReferences: list[_Reference] = []


@cache
def contract(name: str) -> Contract:
    """Load an artifact by contract name, one of `CONTRACTS`."""
    try:
        raw = files("node.chain").joinpath("abi", f"{name}.json").read_bytes()
        artifact = msgspec.json.decode(raw, type=_Artifact)
    except (OSError, msgspec.MsgspecError) as error:
        raise ChainError(f"the artifact of contract {name} is missing or damaged: {error}") from error
    functions: dict[str, _Function] = {}
    events: dict[bytes, _Event] = {}
    errors: dict[bytes, str] = {}
    for item in artifact.abi:
        kinds = tuple(_type_of(part) for part in item.get("inputs", ()))
        signature = f"{item.get('name', '')}({','.join(kinds)})".encode()
        digest = keccak256(signature)
        if item["type"] == "function":
            functions[item["name"]] = _Function(digest[:4], kinds, tuple(item["outputs"]))
        elif item["type"] == "event":
            events[digest] = _Event(item["name"], tuple(item["inputs"]))
        elif item["type"] == "error":
            errors[digest[:4]] = item["name"]
    return Contract(
        name=artifact.contractName,
        abi=artifact.abi,
        bytecode=bytes.fromhex(artifact.bytecode.removeprefix("0x")),
        runtime=bytes.fromhex(artifact.deployedBytecode.removeprefix("0x")),
        immutables=tuple((r.start, r.length) for r in artifact.immutableReferences),
        functions=functions,
        events=events,
        errors=errors,
    )


CONTRACTS: Final = (
    *("Vault", "Workers", "Channels", "Jobs", "Disputes", "Committee", "VerifierResolver", "Attestations"),
    *("MillToken", "MillGovernor", "TimelockController", "TestToken"),
)
"""Everything that is shipped."""


def error_name(data: bytes) -> str:
    """Name of the custom error that a revert carries; the text of a plain ``Error(string)``; hex when it is unknown."""
    selector = data[:4]
    for name in CONTRACTS:
        found = contract(name).errors.get(selector)
        if found is not None:
            return found
    try:
        if selector == _ERROR_STRING:
            return str(abi_decode(["string"], data[4:])[0])[:200]
        if selector == _PANIC:
            return f"Panic(0x{abi_decode(['uint256'], data[4:])[0]:02x})"
    except (DecodingError, OverflowError, UnicodeDecodeError):
        pass
    return f"0x{selector.hex()}" if selector else "reverted"


def decode_log(source: Contract, log: Log) -> ChainEvent | None:
    """A log of `source` as an event; None for a topic that its ABI does not have.

    `args` holds every parameter by its Solidity name, typed as ours. A name that two contracts share is plain for Channels
    and carries the contract's name for the others: ``VaultWithdrawn``.
    """
    event = source.events.get(log.topics[0]) if log.topics else None
    if event is None:
        return None
    plain = [item for item in event.inputs if not item["indexed"]]
    indexed = [item for item in event.inputs if item["indexed"]]
    try:
        values = dict(zip([i["name"] for i in plain], abi_decode([_type_of(i) for i in plain], log.data), strict=True))
        for item, topic in zip(indexed, log.topics[1:], strict=True):
            values[item["name"]] = abi_decode([_type_of(item)], topic)[0]
    except (DecodingError, OverflowError, UnicodeDecodeError, ValueError) as error:
        raise ChainError(f"a log of {source.name}.{event.name} does not decode: {error}") from error
    args = {item["name"]: _typed(item, values[item["name"]]) for item in event.inputs}
    shared = source.name != "Channels" and any(event.name == e.name for e in contract("Channels").events.values())
    name = source.name + event.name if shared else event.name
    return ChainEvent(name, log.block_number, log.block_hash, log.index, args)
