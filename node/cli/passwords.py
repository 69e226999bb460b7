"""Where passwords come from: a descriptor, a file, the prompt. Never an argument, never the environment."""

from __future__ import annotations

import os
import sys

import click

from node.cli.main import Shared
from node.errors import KeyError_
from node.keystore import MAX_PASSWORD_BYTES, PASSWORD_FILE, check, read_file, read_private
from node.signer.sources import KeyFile, open_key
from protocol.keys import PrivateKey

TRIES = 3
SOURCES = "--password-file FILE, --password-fd N, GRISTMILL_KEYS_PASSWORD_FILE, or a terminal for the prompt"


def given(shared: Shared) -> bytes | None:
    """The password by descriptor or file, or None when nobody gave one. Raises KeyError_.

    The file `password` in the keys folder, which an unattended `init` on devnet writes, counts as given.
    """
    if shared.password is None:
        shared.password = _read(shared)
    return shared.password


def _read(shared: Shared) -> bytes | None:
    if shared.password_fd is not None:
        try:
            with os.fdopen(os.dup(shared.password_fd), "rb") as file:
                data = file.read(MAX_PASSWORD_BYTES + 3)
        except OSError as error:
            raise KeyError_(f"descriptor {shared.password_fd} cannot be read: {error.strerror}") from None
        return _one_line(data, f"descriptor {shared.password_fd}")
    named = shared.config.keys.password_file
    path = named or shared.config.keys_dir / PASSWORD_FILE
    if named is None and not path.exists():
        return None
    return _one_line(read_private(path, MAX_PASSWORD_BYTES + 2), str(path))


def new(shared: Shared, what: str) -> bytes:
    """The password for a new key: given, or asked for twice. Raises KeyError_."""
    found = given(shared)
    if found is not None:
        return found
    _need_terminal(what)
    answer: str = click.prompt(f"New password for {what}", hide_input=True, confirmation_prompt=True, err=True)
    return answer.encode()


def source(shared: Shared, name: str) -> KeyFile:
    """A key of the keystore and its password, for a signer to open: given, or asked for, up to three times. Raises KeyError_."""
    store = shared.keystore
    store.address(name)  # missing, unsafe and hostile files are told before a password is asked for
    path = store.path(name)
    found = given(shared)
    if found is not None:
        return KeyFile(str(path), found)
    _need_terminal(f"the key {name}")
    for left in reversed(range(TRIES)):
        answer: str = click.prompt(f"Password of {path}", hide_input=True, err=True)
        try:
            check(read_file(path), answer.encode(), str(path))
            return KeyFile(str(path), answer.encode())
        except KeyError_ as error:
            if not left:
                raise
            shared.output.say(error.message)
    raise KeyError_(f"no password for {name}")  # not reached: the last try raises


def unlock(shared: Shared, name: str) -> PrivateKey:
    """The key itself, in this process: for commands that end at once. Raises KeyError_."""
    return open_key(source(shared, name))


def on_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin is not None and sys.stdin.isatty()


def _need_terminal(what: str) -> None:
    if not on_terminal():
        raise KeyError_(f"{what} needs a password", hint=f"give it by {SOURCES}")


def _one_line(data: bytes, where: str) -> bytes:
    """Without the line end that editors and `echo` add."""
    password = data.removesuffix(b"\n").removesuffix(b"\r")
    if not password:
        raise KeyError_(f"the password in {where} is empty")
    if len(password) > MAX_PASSWORD_BYTES:
        raise KeyError_(f"the password in {where} has more than {MAX_PASSWORD_BYTES} bytes")
    return password
