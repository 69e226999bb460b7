"""`wallet`: the key files of this data dir."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from node.cli import passwords
from node.cli.main import Group, Shared
from node.cli.options import password_options
from node.errors import KeyError_
from node.keystore import MAX_FILE_BYTES, ROLES, decrypt, parse, read_private
from protocol.errors import InvalidValue
from protocol.keys import PrivateKey

NAME = click.argument("name", type=click.Choice(list(ROLES)))


@click.group(cls=Group)
def command() -> None:
    """Make, import and list keys.

    The keys: worker (hot key of a worker, also its peer id), owner (a worker's cold owner), payer (holds a client's
    funds), session (signs a client's vouchers).
    """


@command.command()
@NAME
@password_options
@click.pass_obj
def new(shared: Shared, name: str) -> None:
    """Make a new random key."""
    _refuse_taken(shared, name)
    _show(shared, name, shared.keystore.create(name, passwords.new(shared, f"the key {name}")))


@command.command("import")
@NAME
@click.argument("file", type=click.Path(allow_dash=True, path_type=Path))
@click.option(
    "--from-password-file", type=click.Path(path_type=Path), metavar="FILE", help="Password of the key file read."
)
@password_options
@click.pass_obj
def import_(shared: Shared, name: str, file: Path, from_password_file: Path | None) -> None:
    """Import a key from FILE (`-`: stdin): a Web3 Secret Storage v3 file, or one line of 64 hex digits.

    The key itself is never an argument: arguments are visible to every user of the machine.
    """
    _refuse_taken(shared, name)
    where = "stdin" if str(file) == "-" else str(file)
    data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1) if where == "stdin" else read_private(file, MAX_FILE_BYTES)
    if data.lstrip().startswith(b"{"):
        document = parse(data, where)
        if from_password_file is not None:
            source = read_private(from_password_file, MAX_FILE_BYTES).rstrip(b"\r\n")
        elif passwords.on_terminal():
            source = click.prompt(f"Password of {where}", hide_input=True, err=True).encode()
        else:
            raise KeyError_(f"{where} needs a password", hint="give it with --from-password-file FILE")
        key = decrypt(document, source, where)
    else:
        key = _raw(data, where)
    _show(shared, name, shared.keystore.import_(name, key, passwords.new(shared, f"the key {name}")))


@command.command()
@click.argument("name", type=click.Choice(list(ROLES)), required=False)
@click.pass_obj
def address(shared: Shared, name: str | None) -> None:
    """Show the address of a key, or of all. Needs no password."""
    store = shared.keystore
    for one in (name,) if name else store.names():
        found = str(store.address(one))
        text = found if name else f"{one:<8} {found}"
        shared.output.row({"name": one, "address": found, "file": store.path(one)}, text)


def _raw(data: bytes, where: str) -> PrivateKey:
    # No message repeats what was read: it may be a key with a typing error.
    try:
        return PrivateKey(bytes.fromhex(data.decode("ascii").strip().removeprefix("0x")))
    except (ValueError, InvalidValue):
        raise KeyError_(f"{where} holds neither a v3 key file nor a private key of 64 hex digits") from None


def _refuse_taken(shared: Shared, name: str) -> None:
    """Before a password is asked for."""
    if name in shared.keystore.names():
        raise KeyError_(
            f"{shared.keystore.path(name)} exists already", hint="move it away first; a key is never overwritten"
        )


def _show(shared: Shared, name: str, key: PrivateKey) -> None:
    data = {"name": name, "address": str(key.address), "peer_id": str(key.peer_id), "file": shared.keystore.path(name)}
    shared.output.result(data, str(key.address))
