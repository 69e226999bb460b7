"""What a command says, and where: stdout is data, stderr is for people.

With `--json` stdout carries one object (or one per line, for lists and streams) and nothing else; errors too are an object there.
Without it results are text on stdout, and an error is `error: ...` with an optional `hint: ...` on stderr.

What goes to a terminal is tamed first: models, workers and servers wrote part of it, and a terminal obeys what is printed. A
file or a pipe gets what there is.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from enum import Enum
from typing import Any, TextIO

from protocol.tame import tame


def plain(value: object) -> Any:
    """A value in JSON's own types: bytes as 0x hex, enums as their lower-case name, sets sorted, the rest as its text."""
    match value:
        case Enum():  # before int and str: our codes are IntEnums
            return value.name.lower()
        case None | bool() | int() | float() | str():
            return value
        case bytes() | bytearray() | memoryview():
            return "0x" + bytes(value).hex()
        case Mapping():
            return {str(key): plain(inner) for key, inner in value.items()}
        case set() | frozenset():
            return sorted(plain(inner) for inner in value)
        case list() | tuple():
            return [plain(inner) for inner in value]
        case _:
            return str(value)


def dumps(value: object) -> str:
    """One line of JSON. Money goes in as decimal strings: JSON readers round integers over 2^53."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False)


class Output:
    """The one place where a command writes. Flushes each line, so that a pipe sees a stream as it comes."""

    def __init__(self, *, json: bool = False) -> None:
        self.json = json
        """True: stdout is for machines."""
        self._half = ""
        """The first half of a line end: the other one may come with the next piece of the stream."""

    def result(self, data: Mapping[str, Any], text: str | None = None, *, styled: bool = False) -> None:
        """The command's result: `data` as JSON, or `text` for people (by default `key: value` lines). `styled`: the text has
        colours of ours in it, and its writer has tamed the rest."""
        if self.json:
            self._line(dumps(data))
        elif text is None:
            self._line("\n".join(f"{key}: {_text(value)}" for key, value in data.items()))
        elif text:
            self._line(text, styled=styled)

    row = result
    """One element of a list or a stream: NDJSON, or a line of text. An empty list prints nothing and is success."""

    def line(self, text: str) -> None:
        """One line that is JSON already, and the same for people."""
        self._line(text)

    def write(self, text: str) -> None:
        """A piece of a text stream, without a line end. Only for people: with `--json` send rows."""
        if not self.json:
            text = self._half + text
            self._half = "\r" if text.endswith("\r") else ""
            sys.stdout.write(_for(sys.stdout, text.removesuffix("\r")))
            sys.stdout.flush()

    def say(self, text: str) -> None:
        """Progress and remarks, on stderr."""
        print(_for(sys.stderr, text), file=sys.stderr, flush=True)

    def error(self, code: str, message: str, hint: str = "", details: Mapping[str, Any] | None = None) -> None:
        """An error in the form that both people and machines rely on. `details`: for machines, what the message says too."""
        if self.json:
            self._line(dumps({"error": {"code": code, "message": message, "hint": hint, **(details or {})}}))
            return
        label = "\x1b[31merror\x1b[0m" if color(sys.stderr) else "error"
        print(f"{label}: {_for(sys.stderr, message)}", file=sys.stderr)
        if hint:
            print(f"\nhint: {_for(sys.stderr, hint)}", file=sys.stderr)

    def _line(self, text: str, *, styled: bool = False) -> None:
        sys.stdout.write((text if styled else _for(sys.stdout, text)) + "\n")
        sys.stdout.flush()


class LogFormat(logging.Formatter):
    """Logs are read on terminals later, whatever they are written to."""

    def format(self, record: logging.LogRecord) -> str:
        return tame(super().format(record))


def _for(stream: TextIO, text: str) -> str:
    return tame(text) if stream.isatty() else text


def color(stream: Any) -> bool:
    """Whether to colour this stream: a terminal, and NO_COLOR is not set (https://no-color.org)."""
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _text(value: object) -> str:
    bare = plain(value)
    return bare if isinstance(bare, str) else json.dumps(bare, ensure_ascii=False)
