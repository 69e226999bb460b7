"""The client library. `from node.client import Client` for trio, `sync_client` for everybody else.

Light on purpose: no torch, no web3 and no libp2p are imported before a client connects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from node.client.answers import Answer, Answers
    from node.client.chat import ChatStream
    from node.client.client import Client
    from node.client.sync import sync_client
    from node.client.tasks import Ranking, Scored, Vectors
    from node.client.values import ChatChunk, PartRecord, Usage

_HOME = {
    "Answer": "node.client.answers",
    "Answers": "node.client.answers",
    "Client": "node.client.client",
    "ChatStream": "node.client.chat",
    "ChatChunk": "node.client.values",
    "PartRecord": "node.client.values",
    "Ranking": "node.client.tasks",
    "Scored": "node.client.tasks",
    "Usage": "node.client.values",
    "Vectors": "node.client.tasks",
    "sync_client": "node.client.sync",
}

__all__ = [
    "Answer",
    "Answers",
    "ChatChunk",
    "ChatStream",
    "Client",
    "PartRecord",
    "Ranking",
    "Scored",
    "Usage",
    "Vectors",
    "sync_client",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
