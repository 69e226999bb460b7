"""Tenants: who may share with whom what the engine keeps of prompts.

A prefix that is found in the cache answers sooner, and whoever measures that learns what was asked before. So only prompts of one
payer share: a payer is told to the runtime by a name that nobody outside can compute, and that is another at each start.
"""

from __future__ import annotations

import hmac
import secrets

from protocol.ids import Address


class Tenants:
    """The names of payers during one run of a worker."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def salt(self, payer: Address) -> bytes:
        """32 bytes, for `Prompt.salt`."""
        return hmac.digest(self._secret, payer, "sha256")
