"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from node.cli.main import Shared

F = TypeVar("F", bound=Callable[..., Any])


def setting_option(name: str, key: str, **given: Any) -> Callable[[F], F]:
    """An option that is a setting: its text goes to `shared.flags[key]` and is checked with everything else.

    `@setting_option("--network", "network", help="...")`
    """

    def put(context: click.Context, _parameter: click.Parameter, value: Any) -> None:
        if value is not None and value != ():
            context.ensure_object(Shared).flags[key] = list(value) if isinstance(value, tuple) else value

    return click.option(name, expose_value=False, callback=put, **given)


def request_option(command: F) -> F:
    """`--id`, for commands that send transactions: asked again under one id, they answer and send nothing."""
    return click.option(
        "--id",
        "request",
        default="",
        metavar="ID",
        help="A name for this request: run again with the same one, it is answered and not sent a second time.",
    )(command)


def password_options(command: F) -> F:
    """`--password-file` and `--password-fd`, for every command that opens a key."""

    def put(context: click.Context, _parameter: click.Parameter, value: int | None) -> None:
        if value is not None:
            context.ensure_object(Shared).password_fd = value

    command = click.option(
        "--password-fd",
        type=click.IntRange(0, 65_535),
        metavar="N",
        expose_value=False,
        callback=put,
        help="Read the keystore's password from this open descriptor.",
    )(command)
    return setting_option(
        "--password-file",
        "keys.password_file",
        metavar="FILE",
        help="Read the keystore's password from this file (0600).",
    )(command)
