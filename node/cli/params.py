"""Kinds of arguments: addresses, amounts, durations. What does not parse is a usage error, told before anything happens."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, TextIO

import click

from node.errors import ConfigError
from protocol.errors import InvalidValue
from protocol.ids import UINT128_MAX, Address, ChannelId, Hash32


class AddressType(click.ParamType):
    """An Ethereum address; a mixed-case one must have its EIP-55 checksum right."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Address:
        try:
            return value if isinstance(value, Address) else Address(str(value))
        except InvalidValue as error:
            self.fail(str(error), param, ctx)


class ChannelType(click.ParamType):
    """A channel's id: 32 bytes in hexadecimal."""

    name = "channel"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ChannelId:
        try:
            return value if isinstance(value, ChannelId) else ChannelId(str(value))
        except InvalidValue as error:
            self.fail(f"{str(value)[:80]!r} is no channel id: {error}", param, ctx)


class HashType(click.ParamType):
    """32 bytes in hexadecimal: the id of a job on chain, the hash of a document."""

    name = "hash"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Hash32:
        try:
            return value if isinstance(value, Hash32) else Hash32(str(value))
        except InvalidValue as error:
            self.fail(f"{str(value)[:80]!r} is no hash: {error}", param, ctx)


class NumberType(click.ParamType):
    """A decimal number that is not negative, exactly."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Fraction:
        if isinstance(value, Fraction):
            return value
        text = str(value)
        if not re.fullmatch(r"\d{1,15}(\.\d{1,18})?", text, re.ASCII):
            self.fail(f"{text[:60]!r} is no decimal number of 0 or more", param, ctx)
        return Fraction(text)


class AmountType(click.ParamType):
    """A whole number of a token's smallest unit; `_` may group digits."""

    name = "amount"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        if not re.fullmatch(r"\d[\d_]{0,49}", text, re.ASCII) or text.endswith("_") or "__" in text:
            self.fail(f"{text[:60]!r} is no whole number of the smallest unit", param, ctx)
        if int(text) > UINT128_MAX:
            self.fail("an amount is below 2^128", param, ctx)
        return int(text)


class DurationType(click.ParamType):
    """Seconds, or a number with a unit: ``90``, ``15m``, ``1h``, ``2d``."""

    name = "duration"
    UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d{1,9})([smhd]?)", str(value), re.ASCII)
        if found is None:
            self.fail(f"{str(value)[:60]!r} is no duration such as 90, 15m, 1h or 2d", param, ctx)
        return int(found[1]) * self.UNITS[found[2]]


ADDRESS = AddressType()
NUMBER = NumberType()
AMOUNT = AmountType()
CHANNEL = ChannelType()
DURATION = DurationType()
HASH = HashType()


def text_of(file: TextIO) -> str:
    """All of it. Raises `ConfigError` for what is no text."""
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file.name} is no UTF-8 text: byte 0x{error.object[error.start]:02x} at {error.start} ({error.reason})",
            hint="convert it, for example: iconv -t UTF-8",
        ) from None
