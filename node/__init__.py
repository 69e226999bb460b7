"""Gristmill's effects: trio code which moves bytes, talks to the chain, runs models and writes the disk.

Nothing is imported here: ``import node.client`` must stay free of torch, web3 and the worker.
"""

from __future__ import annotations

__version__ = "0.1.0"
