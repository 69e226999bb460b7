"""What a setting is: its description, unit and bounds, and how text or TOML becomes its value.

Every value is checked here, once, before anything uses it; what comes out is plain, frozen and in range. `node.config` declares
the settings with these pieces and decides which source wins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from protocol.errors import InvalidValue
from protocol.ids import Address
from protocol.pricing import PRICE_MAX, Price
from protocol.tasks import Task

METADATA = "setting"


@dataclass(frozen=True, slots=True)
class Setting:
    """The part of a setting that its type does not say."""

    doc: str
    unit: str = ""
    low: int | None = None
    high: int | None = None
    """Inclusive bounds."""
    check: Callable[[Any], Any] | None = None
    """Returns the value in canonical form, or raises ValueError (`InvalidValue` counts too)."""
    values: str = ""
    """In words, what `check` lets through."""

    def parse(self, kind: str, raw: object, folder: Path) -> Any:
        """The value of `raw`, which is text or came out of TOML. Raises ValueError that says what was expected.

        `kind` is the annotation of the field; `folder` is where relative paths start.
        """
        value = PARSERS[kind](raw, folder)
        if self.low is not None and value is not None and not self.low <= value <= (self.high or value):
            raise ValueError(f"must be {self.bounds}, not {value}")
        if self.check is not None and value:
            try:
                value = self.check(value)
            except InvalidValue as error:
                raise ValueError(str(error)) from None
        return value

    @property
    def bounds(self) -> str:
        """The bounds in words; empty when there are none."""
        if self.low is None:
            return self.values
        return f"{self.low} to {self.high}" if self.high is not None else f"at least {self.low}"


def setting(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    low: int | None = None,
    high: int | None = None,
    check: Callable[[Any], Any] | None = None,
    values: str = "",
) -> Any:
    """A dataclass field that is a setting."""
    return field(default=default, metadata={METADATA: Setting(doc, unit, low, high, check, values)})


def _integer(raw: object, _folder: Path) -> int:
    if isinstance(raw, str) and re.fullmatch(r"[+-]?\d{1,40}(_\d+)*", raw.strip(), re.ASCII):
        return int(raw)
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    raise ValueError(f"must be a whole number, not {_shown(raw)}")


def _boolean(raw: object, _folder: Path) -> bool:
    if isinstance(raw, bool):
        return raw
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if isinstance(raw, str) and raw.strip().lower() in words:
        return words[raw.strip().lower()]
    raise ValueError(f"must be true or false, not {_shown(raw)}")


def _text(raw: object, _folder: Path) -> str:
    if not isinstance(raw, str):
        raise ValueError(f"must be text, not {_shown(raw)}")
    if len(raw) > 4096 or not raw.isprintable():
        raise ValueError("must be one line of at most 4096 printable characters")
    return raw.strip()


def _texts(raw: object, folder: Path) -> tuple[str, ...]:
    """A list; in text form `a,b` or a JSON list."""
    if isinstance(raw, str):
        if raw.lstrip().startswith("["):
            try:
                raw = json.loads(raw)
            except (ValueError, RecursionError):
                raise ValueError(f"must be a JSON list or words with commas between, not {_shown(raw)}") from None
        else:
            raw = [part for part in raw.split(",") if part.strip()]
    if not isinstance(raw, list | tuple) or len(raw) > 256:
        raise ValueError(f"must be a list of at most 256 texts, not {_shown(raw)}")
    return tuple(_text(item, folder) for item in raw)


def _path(raw: object, folder: Path) -> Path:
    if isinstance(raw, Path):
        raw = str(raw)
    text = _text(raw, folder)
    if not text:
        raise ValueError("must be a path, not empty")
    try:
        return (folder / Path(text).expanduser()).absolute()
    except RuntimeError:  # ~NAME of somebody whom this machine does not know
        raise ValueError(f"must be a path, and there is no such home directory: {_shown(raw)}") from None


def _path_or_none(raw: object, folder: Path) -> Path | None:
    return None if raw in ("", None) else _path(raw, folder)


PARSERS: Mapping[str, Callable[[object, Path], Any]] = {
    "int": _integer,
    "bool": _boolean,
    "str": _text,
    "tuple[str, ...]": _texts,
    "Path": _path,
    "Path | None": _path_or_none,
}
"""By annotation: how a raw value becomes one of that type."""


def _shown(raw: object) -> str:
    text = repr(raw)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------------------- checks


def each(check: Callable[[str], str]) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    """A check of every element of a list."""
    return lambda values: tuple(check(value) for value in values)


def one_of(*allowed: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}, not {_shown(value)}")
        return value

    return check


def matching(pattern: str, what: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value, re.ASCII):
            raise ValueError(f"must be {what}, not {_shown(value)}")
        return value

    return check


def web_address(value: str) -> str:
    try:
        parts = urlsplit(value)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        # An RPC address often carries an API key: an error must not repeat it.
        raise ValueError("must be an http:// or https:// address")
    return value


def endpoint(value: str) -> str:
    """`HOST:PORT`, `[IPV6]:PORT`, or a port alone, which is one of 127.0.0.1; port 0 lets the system choose."""
    host, port = split_endpoint(value)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_endpoint(value: str) -> tuple[str, int]:
    """Host and port. Raises `ValueError`."""
    found = re.fullmatch(
        r"(?:(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9.-]{1,253}))?:)?(\d{1,5})", value.strip(), re.ASCII
    )
    if not found or int(found[3]) > 65_535:
        raise ValueError(f"must be HOST:PORT or PORT, not {_shown(value)}")
    return found[1] or found[2] or "127.0.0.1", int(found[3])


def account(value: str) -> str:
    return str(Address(value))


def ratio(value: str) -> str:
    """A decimal number or a fraction above 0, exact: it compares money."""
    try:
        if not re.fullmatch(r"\d{1,40}(\.\d{1,40}|/\d{1,40})?", value, re.ASCII) or not Fraction(value):
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"must be a decimal number or a fraction above 0, not {_shown(value)}") from None
    return value


def task_price(value: str) -> str:
    """``TASK=REQUEST/INPUT/OUTPUT``: three amounts in smallest units, the last two per 1,000,000 units of the task."""
    try:
        task_price_of(value)
    except ValueError:
        raise ValueError(f"must be like {Task.TRANSCRIBE.value}=0/30000/400000, not {_shown(value)}") from None
    return value


def task_price_of(value: str) -> tuple[Task, Price]:
    """Raises `ValueError`."""
    name, _, prices = value.partition("=")
    if not re.fullmatch(r"\d{1,19}/\d{1,19}/\d{1,19}", prices, re.ASCII):
        raise ValueError(value)
    amounts = [int(one) for one in prices.split("/")]
    if max(amounts) > PRICE_MAX or Task(name) is Task.CHAT:
        raise ValueError(value)
    return Task(name), Price(*amounts)


def power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"must be a power of two, not {value}")
    return value
