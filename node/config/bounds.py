"""Names and bounds that several sections share."""

from __future__ import annotations

from typing import Final

from node.settings import matching

AMOUNT_MAX: Final = 2**63 - 1
VALUE_MAX: Final = 10**30
DELAY_MIN: Final = 900
DELAY_MAX: Final = 30 * 24 * 3600
"""The Channels contract refuses withdraw delays outside of these (seconds)."""

DEFAULT: Final = "default"
"""What `[chain]` is called among the chains, and the token of its deployment among the tokens."""
SHORT_NAME: Final = "[a-z][a-z0-9]{0,15}"
short_name = matching(SHORT_NAME, "a name of at most 16 lower-case letters and digits")
