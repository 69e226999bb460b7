"""What others wrote, made safe to show.

A terminal obeys what is printed on it: escape sequences clear it, move about on it, set its title, write the clipboard; a
carriage return writes over what we said; marks of direction show text in another order than it has. None of that is anybody's to
send us.
"""

from __future__ import annotations

import re
from typing import Final

_ORDERS: Final = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]|\r(?!\n)"
)
"""All control characters but tabs and line ends, and the marks that turn the direction of text."""


def tame(text: str) -> str:
    """The text with every order to a terminal replaced by U+FFFD. Line ends and tabs stay."""
    return _ORDERS.sub("\ufffd", text)


def one_line(text: str) -> str:
    """The same on one line: for a peer's reasons, which stand in errors and logs and must not look like lines of ours."""
    return " ".join(tame(text).split())
