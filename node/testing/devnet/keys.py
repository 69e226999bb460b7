"""Accounts that hold coins on the simulated chains.

These are the first three keys of the mnemonic that every Ethereum tool ships ("test test … junk"). They are public: never send
them anything of value. Both chains fund them, so one test runs on either.
"""

from __future__ import annotations

from typing import Final

from protocol.keys import PrivateKey

FUNDED_KEYS: Final = tuple(
    PrivateKey(bytes.fromhex(secret))
    for secret in (
        "ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80",
        "59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d",
        "5de4111afa1a4b94908f83103eb1f1706367c2e68ca870fc3fb9a804cdab365a",
    )
)
FUNDED_WEI: Final = 10_000 * 10**18
"""What each of them has at the start."""
