"""`[keys]`: the keystore, and where the keys are while we run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from node.settings import one_of, power_of_two, setting


@dataclass(frozen=True, slots=True)
class KeysConfig:
    """The keystore."""

    scrypt_n: int = setting(
        1 << 18,
        "scrypt's cost of new key files: memory is 1 KiB times this. A power of two.",
        low=1 << 12,
        high=1 << 18,
        check=power_of_two,
    )
    signer: str = setting(
        "process",
        "Where the keys are: `process`, in a process of their own, or `inline`, in the node's. Policy and memory are the same.",
        check=one_of("process", "inline"),
        values="process, inline",
    )
    password_file: Path | None = setting(
        None,
        "File that holds the keystore's password, mode 0600. Empty: `keys/password` in the data dir, else the prompt.",
    )
