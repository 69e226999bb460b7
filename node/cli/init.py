"""`init`: data dir, configuration file, keys. Safe to run again: what is there stays."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

import click

from node.cli import passwords
from node.cli.main import Command, Shared
from node.cli.options import password_options, setting_option
from node.config import KEYS, SECTIONS, Config, Key
from node.errors import ConfigError
from node.keystore import PASSWORD_FILE, Keystore, private_folder, write_new

ROLE_KEYS = {"worker": ("worker",), "client": ("payer", "session")}
RANDOM_PASSWORD_N = 1 << 12
"""scrypt's cost for keys under a random password of 256 bits, which nobody can guess whatever a guess costs."""


@click.command(cls=Command)
@setting_option("--network", "network", metavar="NAME", help="Network to join; `devnet` by default.")
@click.option(
    "--role",
    "roles",
    type=click.Choice(list(ROLE_KEYS)),
    multiple=True,
    default=tuple(ROLE_KEYS),
    help="Make the keys of this role only; repeatable. By default both.",
)
@password_options
@click.pass_obj
def command(shared: Shared, roles: tuple[str, ...]) -> None:
    """Make the data dir: configuration file and keys.

    Settings given with --set go into the new configuration file. On devnet, when no password is given and nobody can
    be asked, a random one is written beside the keys: fine where nothing has value, wrong anywhere else.
    """
    config = shared.config
    _own_folder(config.data_dir)
    private_folder(config.keys_dir)
    wanted = [name for role in ROLE_KEYS if role in roles for name in ROLE_KEYS[role]]
    missing = [name for name in wanted if name not in shared.keystore.names()]
    fresh = _random_password(shared) if missing else False
    password = passwords.new(shared, "the new keys") if missing else b""
    store = Keystore(config.keys_dir, scrypt_n=RANDOM_PASSWORD_N) if fresh else shared.keystore
    made: list[dict[str, Any]] = []
    for name in wanted:
        made.append({"name": name, "created": name in missing})
        if name in missing:
            key = store.create(name, password)
            made[-1] |= {"address": str(key.address), "peer_id": str(key.peer_id)}
        else:
            made[-1] |= {"address": str(store.address(name))}
    wrote_config = _write_config(config)
    beside = config.keys_dir / PASSWORD_FILE
    password_file = beside if beside.exists() else None
    data = {
        "data_dir": config.data_dir,
        "config": config.user_file,
        "config_created": wrote_config,
        "network": config.network,
        "keys": made,
        "password_file": password_file,
    }
    lines = [
        f"data dir  {config.data_dir}",
        f"config    {config.user_file}" + ("" if wrote_config else " (kept)"),
        *(f"{key['name']:<9} {key['address']}" + ("" if key["created"] else " (kept)") for key in made),
    ]
    if password_file:
        lines.append(f"password  {password_file} (beside the keys: for devnet only)")
    shared.output.result(data, "\n".join(lines))


def _own_folder(folder: Path) -> None:
    """Make the data dir, or refuse one in which another user could put files of theirs in place of ours."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be used: {error.strerror}") from None
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"other users can write to {folder}", hint=f"chmod go-w {folder}, or choose another --data-dir"
        )


def _random_password(shared: Shared) -> bool:
    """Write a random password where `passwords.given` finds it, when this is devnet and nobody gives one; true when done."""
    config = shared.config
    path = config.keys_dir / PASSWORD_FILE
    if config.network != "devnet" or passwords.given(shared) is not None:
        return False
    if config.origins.get("network") != "flag" and passwords.on_terminal():
        return False  # somebody is there to be asked, and did not say that this is for devnet
    write_new(path, secrets.token_urlsafe(32).encode() + b"\n")
    shared.output.say(f"note: a random password is in {path}, beside the keys it opens; for devnet only")
    return True


def _write_config(config: Config) -> bool:
    """Write the user file unless it exists; true when it was written."""
    path = config.user_file
    if path is None or path.exists():
        return False
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path.parent} cannot be made: {error.strerror}") from None
    write_new(path, template(config).encode())
    return True


def template(config: Config) -> str:
    """A configuration file: every key with its description, commented out unless a flag gave it."""
    lines = [
        "# Gristmill's settings. Flags and GRISTMILL_* variables win over this file; `gristmill config show --origin` tells all."
    ]
    for section in ("", *SECTIONS):
        lines += ["", f"[{section}]"] if section else []
        for key in KEYS.values():
            if key.name.rpartition(".")[0] != section or key.name == "data_dir":
                continue
            kept = _kept(config, key) and key.name != "keys.password_file"
            value = config.get(key.name) if kept else key.default
            unit = f" Unit: {key.setting.unit}." if key.setting.unit else ""
            lines += ["", f"# {key.setting.doc}{unit}"]
            lines += [("" if kept else "# ") + f"{key.name.rpartition('.')[2]} = {toml_value(value)}"]
    lines += ["", "# Further chains and tokens: tables [chains.NAME] and [tokens.NAME], see docs/reference/config.md."]
    table = ""
    for key in config.keys_in_use():
        if key.name not in KEYS and _kept(config, key):
            own, _, last = key.name.rpartition(".")
            lines += [] if own == table else ["", f"[{own}]"]
            lines += [f"{last} = {toml_value(config.get(key.name))}"]
            table = own
    return "\n".join(lines) + "\n"


def _kept(config: Config, key: Key) -> bool:
    """Whether `init` was given this setting, which then goes into the file."""
    return config.origins.get(key.name) == "flag"


def toml_value(value: object) -> str:
    """A setting's value in TOML. JSON's strings, numbers, booleans and lists are TOML's too."""
    if isinstance(value, tuple):
        return json.dumps(list(value))
    return json.dumps("" if value is None else str(value) if isinstance(value, Path) else value)
