"""Key files: the format is the world's, hostile ones cost nothing, and no secret is ever shown."""

from __future__ import annotations

import json
import logging
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.errors import KeyError_
from node.keystore import ROLES, Keystore, decrypt, encrypt, parse, write_new
from protocol.keys import PrivateKey

N = 1 << 12
PASSWORD = b"correct horse"
SECRET = bytes.fromhex("4c0883a69102937d6231471b5dbb6204fe5129617082792ae468d01a3f362318")
KEY = PrivateKey(SECRET)
FILE = encrypt(KEY, PASSWORD, N)


@pytest.fixture
def store(tmp_path: Path) -> Keystore:
    return Keystore(tmp_path / "keys", scrypt_n=N)


def document(**changes: Any) -> dict[str, Any]:
    """A good key file, with changes by dotted name; `...` removes."""
    made: dict[str, Any] = json.loads(FILE)
    for name, value in changes.items():
        *folders, last = name.split("__")
        at = made
        for folder in folders:
            at = at[folder]
        if value is ...:
            del at[last]
        else:
            at[last] = value
    return made


def opened(made: object, password: bytes = PASSWORD) -> PrivateKey:
    return decrypt(parse(json.dumps(made).encode(), "x.json"), password, "x.json")


def test_create_load_and_modes(store: Keystore) -> None:
    made = {name: store.create(name, PASSWORD) for name in ROLES}
    assert len({key.address for key in made.values()}) == len(ROLES)
    assert store.names() == tuple(ROLES)
    assert store.folder.stat().st_mode & 0o777 == 0o700
    for name, key in made.items():
        assert store.path(name).stat().st_mode & 0o777 == 0o600
        assert store.address(name) == key.address == store.load(name, PASSWORD).address
    assert sorted(path.name for path in store.folder.iterdir()) == sorted(f"{name}.json" for name in ROLES)


def test_the_modes_do_not_depend_on_the_umask(store: Keystore) -> None:
    before = os.umask(0)
    try:
        store.create("worker", PASSWORD)
    finally:
        os.umask(before)
    store.load("worker", PASSWORD)


@pytest.mark.parametrize(("kdf", "cost"), [("scrypt", N), ("pbkdf2", 1000)])
def test_we_open_what_eth_account_writes(kdf: Any, cost: int) -> None:
    from eth_account import Account

    assert opened(Account.encrypt(SECRET, PASSWORD.decode(), kdf=kdf, iterations=cost)).secret_bytes() == SECRET


def test_eth_account_opens_what_we_write() -> None:
    from eth_account import Account

    assert bytes(Account.decrypt(document(), PASSWORD.decode())) == SECRET


@pytest.mark.parametrize(
    "crypto",
    [
        {  # the two vectors of the Web3 Secret Storage definition
            "cipher": "aes-128-ctr",
            "cipherparams": {"iv": "6087dab2f9fdbbfaddc31a909735c1e6"},
            "ciphertext": "5318b4d5bcd28de64ee5559e671353e16f075ecae9f99c7a79a38af5f869aa46",
            "kdf": "pbkdf2",
            "kdfparams": {
                "c": 262144,
                "dklen": 32,
                "prf": "hmac-sha256",
                "salt": "ae3cd4e7013836a3df6bd7241b12db061dbe2c6785853cce422d148a624ce0bd",
            },
            "mac": "517ead924a9d0dc3124507e3393d175ce3ff7c1e96529c6c555ce9e51205e9b2",
        },
        {
            "cipher": "aes-128-ctr",
            "cipherparams": {"iv": "83dbcc02d8ccb40e466191a123791e0e"},
            "ciphertext": "d172bf743a674da9cdad04534d56926ef8358534d458fffccd4e6ad2fbde479c",
            "kdf": "scrypt",
            "kdfparams": {
                "dklen": 32,
                "n": 262144,
                "p": 8,
                "r": 1,
                "salt": "ab0c7876052600dd703518d6fc3fe8984592145b591fc8fb5c6d43190334ba19",
            },
            "mac": "2103ac29920d71da29f15d75b4a16dbe95cfd7ff8faea1056c33131d846e3097",
        },
    ],
    ids=["pbkdf2", "scrypt"],
)
def test_the_vectors_of_the_definition(crypto: dict[str, Any]) -> None:
    key = opened({"version": 3, "id": "3198bc9c-6672-5ab3-d995-4942343ae5b6", "crypto": crypto}, b"testpassword")
    assert key.secret_bytes().hex() == "7a28b5ba57c53603b0b07b56bba752f7784bf506fa95edc395f5cf6c7514fe9d"


HOSTILE: dict[str, dict[str, Any]] = {
    "scrypt n 2^22": {"crypto__kdfparams__n": 1 << 22},
    "scrypt n 2^19": {"crypto__kdfparams__n": 1 << 19},
    "scrypt n no power": {"crypto__kdfparams__n": 5000},
    "scrypt n 1": {"crypto__kdfparams__n": 1},
    "scrypt n huge": {"crypto__kdfparams__n": 1 << 200},
    "scrypt n negative": {"crypto__kdfparams__n": -4096},
    "scrypt n text": {"crypto__kdfparams__n": "4096"},
    "scrypt n missing": {"crypto__kdfparams__n": ...},
    "scrypt r huge": {"crypto__kdfparams__r": 1 << 20},
    "scrypt p huge": {"crypto__kdfparams__p": 1 << 20},
    "dklen huge": {"crypto__kdfparams__dklen": 1 << 30},
    "pbkdf2 slow": {
        "crypto__kdf": "pbkdf2",
        "crypto__kdfparams": {"c": 10**7, "dklen": 32, "prf": "hmac-sha256", "salt": "00"},
    },
    "pbkdf2 other prf": {
        "crypto__kdf": "pbkdf2",
        "crypto__kdfparams": {"c": 1, "dklen": 32, "prf": "hmac-md5", "salt": "00"},
    },
    "unknown kdf": {"crypto__kdf": "argon2"},
    "unknown cipher": {"crypto__cipher": "aes-128-cbc"},
    "short iv": {"crypto__cipherparams__iv": "00"},
    "long ciphertext": {"crypto__ciphertext": "00" * 64},
    "bad hex": {"crypto__mac": "zz" * 32},
    "long salt": {"crypto__kdfparams__salt": "00" * 4096},
    "version 4": {"version": 4},
    "no crypto": {"crypto": ...},
    "crypto a list": {"crypto": []},
    "other address": {"address": "00" * 20},
    "address no hex": {"address": "zz"},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused_before_they_cost_anything(changes: dict[str, Any]) -> None:
    """The bar: milliseconds and no memory, where a naive reader takes half a minute and four gigabytes."""
    made = document(**changes)
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(KeyError_) as caught:
            opened(made)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert time.process_time() - started < 1 and peak < 8 << 20
    assert caught.value.exit_status == 4 and len(caught.value.message) < 400


def test_the_dearest_allowed_file_is_geths() -> None:
    """n = 2^18, r = 8, p = 1 passes the bounds; one step more in n or r does not."""
    made = document(crypto__kdfparams__n=1 << 18)
    with pytest.raises(KeyError_, match="wrong password"):
        opened(made)
    for more in ({"crypto__kdfparams__n": 1 << 19}, {"crypto__kdfparams__n": 1 << 18, "crypto__kdfparams__r": 9}):
        with pytest.raises(KeyError_, match="refused before it is tried"):
            opened(document(**more))


@given(n=st.integers(1, 1 << 33), r=st.integers(1, 1 << 33), p=st.integers(1, 1 << 33))
@settings(max_examples=200, deadline=None)
def test_no_parameters_escape_the_bounds(n: int, r: int, p: int) -> None:
    """What is not refused is either wrong-password slow at most, or opens: never a crash of the library below."""
    for power in (n, 1 << n.bit_length()):
        if 128 * power * r <= 1 << 22 and power * r * p <= 1 << 16:
            continue  # allowed and cheap; allowed and dear is the test above
        if power & (power - 1) == 0 and 128 * power * r <= 256 << 20 and power * r * p <= 1 << 22:
            continue
        made = document(crypto__kdfparams__n=power, crypto__kdfparams__r=r, crypto__kdfparams__p=p)
        with pytest.raises(KeyError_):
            opened(made)


@pytest.mark.parametrize(
    ("n", "r", "p"), [(2, 1, 1), (1 << 14, 1, 1), (1 << 16, 1, 1), (4096, 8, 6), (2, 8, 4096), (16, 512, 8)]
)
def test_odd_but_allowed_parameters_only_fail_by_password(n: int, r: int, p: int) -> None:
    with pytest.raises(KeyError_, match="wrong password"):
        opened(document(crypto__kdfparams__n=n, crypto__kdfparams__r=r, crypto__kdfparams__p=p))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 60_000, b'{"a":' * 10_000, b" " * (64 << 10) + b"{}"]
)
def test_what_is_no_key_file_is_told(data: bytes) -> None:
    with pytest.raises(KeyError_, match=r"no key file|no Web3 Secret Storage"):
        parse(data, "x.json")


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_a_changed_byte_opens_the_same_key_or_none(position: int, byte: int) -> None:
    data = bytearray(FILE)
    data[position % len(data)] = byte
    try:
        assert decrypt(parse(bytes(data), "x.json"), PASSWORD, "x.json").secret_bytes() == SECRET
    except KeyError_:
        pass


def test_passwords(store: Keystore) -> None:
    store.import_("payer", KEY, PASSWORD)
    for wrong in (b"", PASSWORD + b"\n", PASSWORD[:-1], b"x" * 2000):
        with pytest.raises(KeyError_):
            store.load("payer", wrong)
    with pytest.raises(KeyError_, match="wrong password") as caught:
        store.load("payer", b"wrong")
    assert "--password-file" in caught.value.hint
    for bad in (b"", b"x" * 2000):
        with pytest.raises(KeyError_, match="password has 1 to"):
            store.create("worker", bad)
    assert store.names() == ("payer",)


def test_a_key_is_never_overwritten(store: Keystore) -> None:
    store.import_("payer", KEY, PASSWORD)
    before = store.path("payer").read_bytes()
    for attempt in (lambda: store.create("payer", PASSWORD), lambda: write_new(store.path("payer"), b"x")):
        with pytest.raises(KeyError_, match="exists already"):
            attempt()
    assert store.path("payer").read_bytes() == before
    assert [path.name for path in store.folder.iterdir()] == ["payer.json"]


def test_a_failed_write_leaves_nothing(store: Keystore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(KeyError_, match="No space left"):
        store.create("worker", PASSWORD)
    assert store.names() == ()


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda store: store.path("payer").chmod(0o640), "mode 0640"),
        (lambda store: store.path("payer").chmod(0o604), "mode 0604"),
        (lambda store: store.folder.chmod(0o755), "mode 0755"),
        (lambda store: store.path("payer").unlink(), "no key at"),
        (
            lambda store: (store.path("payer").unlink(), store.path("payer").mkdir(mode=0o700)),
            "is not what it should be|cannot",
        ),
    ],
)
def test_unsafe_and_missing_files_are_refused(store: Keystore, break_it: Callable[[Keystore], Any], says: str) -> None:
    store.import_("payer", KEY, PASSWORD)
    break_it(store)
    for look in (lambda: store.load("payer", PASSWORD), lambda: store.address("payer")):
        with pytest.raises(KeyError_, match=says):
            look()


@pytest.mark.parametrize("name", ["", "..", "../worker", "worker.json", "x"])
def test_only_known_names_become_paths(store: Keystore, name: str) -> None:
    with pytest.raises(KeyError_, match="no key called"):
        store.load(name, PASSWORD)


def test_the_secret_is_in_no_repr_error_or_log(store: Keystore, caplog: pytest.LogCaptureFixture) -> None:
    """S4: the canary: this key's digits, and its password, appear in nothing that a person may see."""
    said: list[str] = []
    with caplog.at_level(logging.DEBUG):
        store.import_("payer", KEY, PASSWORD)
        key = store.load("payer", PASSWORD)
        said += [repr(key), str(key), repr(store), f"{key!r:>80}"]
        for attempt in (
            lambda: store.load("payer", b"wrong"),
            lambda: opened(document(address="00" * 20)),
            lambda: PrivateKey(SECRET + b"\0"),
            lambda: key.__reduce__(),
        ):
            try:
                attempt()
            except Exception as error:
                said += [str(error), repr(error), getattr(error, "hint", "")]
    said += [record.getMessage() for record in caplog.records] + [store.path("payer").read_text()]
    for text in said:
        assert SECRET.hex() not in text.lower() and str(int.from_bytes(SECRET)) not in text
        assert PASSWORD.decode() not in text


@given(secret=st.binary(min_size=32, max_size=32), password=st.binary(min_size=1, max_size=64))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_encrypted_opens_again(secret: bytes, password: bytes) -> None:
    key = PrivateKey(b"\x01" + secret[1:])
    assert decrypt(parse(encrypt(key, password, N), "x"), password, "x").secret_bytes() == key.secret_bytes()
