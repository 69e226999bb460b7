"""A block's header as the bytes that its hash is of, for `Committee.seal`.

Rules:
- JSON-RPC gives the fields of a header, not the header. It is put together here and held against the block's hash: what does
  not fit, a field of a fork that we do not know for one, is an error and never sent.
- Newer fields stand at the end and are there or not. The randomness has been the fourteenth from the first block on.

Source: Yellow Paper 4.4.3, EIP-1559, EIP-4895, EIP-4844, EIP-4788, EIP-7685, EIP-7928 (header fields in their order).
"""

from __future__ import annotations

from typing import Any, Final

from node.chain.values import blob, quantity
from node.errors import ChainError
from protocol.ids import keccak256
from protocol.transactions import rlp

_ALWAYS: Final = (
    ("parentHash", 32),
    ("sha3Uncles", 32),
    ("miner", 20),
    ("stateRoot", 32),
    ("transactionsRoot", 32),
    ("receiptsRoot", 32),
    ("logsBloom", 256),
    ("difficulty", None),
    ("number", None),
    ("gasLimit", None),
    ("gasUsed", None),
    ("timestamp", None),
    ("extraData", 0),
    ("mixHash", 32),
    ("nonce", 8),
)
"""(field, bytes of it): None is an integer, 0 bytes of any length."""
_LATER: Final = (
    ("baseFeePerGas", None),
    ("withdrawalsRoot", 32),
    ("blobGasUsed", None),
    ("excessBlobGas", None),
    ("parentBeaconBlockRoot", 32),
    ("requestsHash", 32),
    ("blockAccessListHash", 32),
)
_MAX_EXTRA: Final = 1024
"""Bytes of extraData; the main chain allows 32, others more."""


def header_rlp(found: Any) -> bytes:
    """The header of a block as eth_getBlockByNumber shows it. Raises `ChainError` when it is not the one that was hashed."""
    if not isinstance(found, dict):
        raise ChainError("the chain's node answered with no block")
    fields: list[bytes | int] = []
    for name, size in (*_ALWAYS, *(later for later in _LATER if found.get(later[0]) is not None)):
        value = found.get(name)
        if size is None:
            fields.append(quantity(value, name))
        else:
            fields.append(blob(value, name, size=size or None, limit=_MAX_EXTRA))
    header = rlp(fields)
    if keccak256(header) != blob(found.get("hash"), "block hash", size=32):
        raise ChainError(
            "the header's fields do not give the block's hash",
            hint="a fork of the chain may have added a field that this version does not know: update",
        )
    return header
