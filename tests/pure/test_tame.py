"""What others wrote gives no orders to a terminal, wherever it is shown."""

from __future__ import annotations

import unicodedata

import pytest

from node.errors import Refused, WorkerFault
from protocol.errors import RefusalReason, RemoteProtocolError, WireCode
from protocol.tame import one_line, tame

EVIL = "\x1b[2J\x1b[1;1Hsettled: 0 paid\x1b]52;c;cm0gLXJm\x07"


def test_every_control_character_goes_but_tabs_and_line_ends() -> None:
    for number in range(0x110000):
        if unicodedata.category(chr(number)) == "Cc":
            assert (tame(f"a{chr(number)}b") == f"a{chr(number)}b") == (chr(number) in "\t\n"), hex(number)


@pytest.mark.parametrize("text", ["", "plain", "two\nlines\tand a tab", "a\r\nb", "Ünïcode 漢字 👩‍👩‍👧 שלום"])
def test_what_is_no_order_stays(text: str) -> None:
    assert tame(text) == text


@pytest.mark.parametrize(
    "text",
    [EVIL, "paid 5\rpaid 9", "\x9b2J", "\u202eevil", "\u2066x", "\u200ex", "\u200fx", "\u061cx", "\x7f", "\x08\x08"],
)
def test_orders_do_not(text: str) -> None:
    shown = tame(text)
    assert "\ufffd" in shown and not any(unicodedata.category(one) == "Cc" for one in shown)
    assert tame(shown) == shown


def test_a_peers_reason_is_one_line() -> None:
    assert one_line("busy\nINFO node.worker: paid\r\n\tall") == "busy INFO node.worker: paid all"


@pytest.mark.parametrize(
    "error",
    [
        RemoteProtocolError(WireCode.INTERNAL, EVIL),
        Refused(RefusalReason.BUSY, EVIL),
        WorkerFault(f"somebody: {EVIL}"),
    ],
)
def test_errors_carry_no_orders(error: Exception) -> None:
    for text in (str(error), getattr(error, "detail", ""), getattr(error, "message", "")):
        assert "\x1b" not in text and "\x07" not in text
    assert "settled: 0 paid" in str(error)
