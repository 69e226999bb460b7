"""Invariants K9 to K11 on the real thing: the table on disk, both signers, the process and how it dies."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from node.chain.pending import PendingTx
from node.errors import KeyError_, SignerError, SignerFailed, SignerLocked, SignerOutdated, SignerRefused
from node.groups import plain_errors
from node.keystore import Keystore
from node.signer.client import ProcessSigners, open_process
from node.signer.journal import BEGUN, attach
from node.signer.keys import Follow, Signers
from node.signer.local import LocalSigners, open_local
from node.signer.sources import KeyFile, RawKey
from node.signer.table import Table
from node.store.ledger import ADOPTED, Entry, Ledger
from node.testing.pair import key
from protocol.frames import encode_frame
from protocol.identity import IdentityMessage
from protocol.ids import Address, ChannelId, Hash32, JobId, ModelId
from protocol.keys import recover
from protocol.signing import (
    CallRule,
    ChannelAllocation,
    DomainRule,
    FeeRule,
    KeyRole,
    Mark,
    Policy,
    Scope,
    SigningReason,
    TokenRule,
)
from protocol.signing_history import KnownChannel, word_of
from protocol.transactions import Transaction
from protocol.typed_data import (
    MARKET_DOMAIN,
    Acceptance,
    Allocation,
    ChannelConfig,
    Close,
    Domain,
    Receipt,
    Refusal,
    Voucher,
)

DOMAIN = Domain(31337, Address(b"\x01" * 20))
TOKEN = Address(b"\x05" * 20)
KINDS = ("Voucher", "Ask", "Receipt", "Close", "ChannelAllocation")
POLICY = Policy(
    domains=(
        *(DomainRule(kind, DOMAIN.chain_id, bytes(DOMAIN.verifying_contract)) for kind in KINDS),
        DomainRule("Refusal", 0, bytes(20)),
    ),
    tokens=(TokenRule(DOMAIN.chain_id, bytes(TOKEN)),),
    calls=(CallRule(DOMAIN.chain_id, b"\x09" * 20),),
    fees=(FeeRule(DOMAIN.chain_id, max_fee=100),),
    identity=True,
)
KEYS = {role: key(role.value) for role in KeyRole}
CLIENT = {role: KEYS[role] for role in (KeyRole.PAYER, KeyRole.SESSION)}
WORKER = {KeyRole.WORKER: KEYS[KeyRole.WORKER]}
ZERO = Hash32(bytes(32))
CHANNEL = ChannelId(b"\x07" * 32)
Open = Callable[[Path], Any]


def allocation(salt: int, total: int) -> ChannelAllocation:
    config = ChannelConfig(
        KEYS[KeyRole.PAYER].address, KEYS[KeyRole.SESSION].address, TOKEN, TOKEN, TOKEN, 900, Hash32(salt.to_bytes(32))
    )
    return ChannelAllocation(config, Allocation(config.channel_id(DOMAIN), total, 1))


def channel(salt: int) -> ChannelId:
    return allocation(salt, 1).allocation.channel_id


def receipt(number: int, cost: int) -> Receipt:
    return Receipt(JobId(ZERO), 0, CHANNEL, number, ModelId(ZERO), ZERO, ZERO, ZERO, 1, 2, cost, ZERO, 1, 2, 0)


@asynccontextmanager
async def in_process(path: Path, keys: Any = None) -> AsyncIterator[ProcessSigners]:
    sources = {role: RawKey(one.secret_bytes()) for role, one in (keys or CLIENT).items()}
    async with open_process(sources, POLICY, path) as signers:
        yield signers


@asynccontextmanager
async def inline(path: Path, keys: Any = None) -> AsyncIterator[LocalSigners]:
    signers = open_local(keys or CLIENT, POLICY, path)
    try:
        yield signers
    finally:
        signers.close()


BOTH = pytest.mark.parametrize("opened", [in_process, inline], ids=["process", "inline"])


async def meet(signers: Signers, known: Sequence[KnownChannel] = (), *, adopting: bool | None = None) -> Any:
    return await signers.meet(
        known, Mark(0, bytes(32)), adopting=signers.empty if adopting is None else adopting, following=Follow()
    )


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def timed() -> None:
        with trio.fail_after(60):
            await main()

    with plain_errors():
        trio.run(timed)


def table_at(tmp_path: Path) -> Path:
    return tmp_path / "signer" / "client.sqlite"


# -------------------------------------------------------------------------------------------------------------- both


@BOTH
def test_both_signers_sign_alike_and_remember(tmp_path: Path, opened: Open) -> None:
    async def main() -> None:
        path = table_at(tmp_path)
        async with opened(path) as signers:
            payer, session = signers[KeyRole.PAYER], signers[KeyRole.SESSION]
            assert (payer.address, session.peer_id) == (KEYS[KeyRole.PAYER].address, KEYS[KeyRole.SESSION].peer_id)
            await meet(signers)
            asked = allocation(1, 500)
            assert recover(asked.digest(DOMAIN), await payer.sign(asked, DOMAIN)) == payer.address
            voucher = Voucher(channel(1), 100)
            first = await session.sign(voucher, DOMAIN)
            assert first == KEYS[KeyRole.SESSION].sign(voucher.digest(DOMAIN)) == await session.sign(voucher, DOMAIN)
            for lower in (0, 99):
                with pytest.raises(SignerRefused) as caught:
                    await session.sign(Voucher(channel(1), lower), DOMAIN)
                assert caught.value.reason is SigningReason.NOT_HIGHER
            with pytest.raises(SignerRefused):
                await payer.sign(Voucher(channel(1), 101), DOMAIN)
            pair = await session.sign_all([(Voucher(channel(1), 110), DOMAIN), (Voucher(channel(1), 111), DOMAIN)])
            assert len(set(pair)) == 2
        async with opened(path) as signers:
            await meet(signers)
            with pytest.raises(SignerRefused):
                await signers[KeyRole.SESSION].sign(Voucher(channel(1), 110), DOMAIN)
            assert await signers[KeyRole.SESSION].sign(Voucher(channel(1), 111), DOMAIN) == pair[1]

    run(main)


@BOTH
def test_what_is_weighed_leaves_no_mark_and_gives_no_signature(tmp_path: Path, opened: Open) -> None:
    async def main() -> None:
        async with opened(table_at(tmp_path)) as signers:
            payer, session = signers[KeyRole.PAYER], signers[KeyRole.SESSION]
            await meet(signers)
            assert await payer.weigh(allocation(1, 500), DOMAIN) is None
            with pytest.raises(SignerRefused) as caught:  # so it is not allocated
                await session.weigh(Voucher(channel(1), 100), DOMAIN)
            assert caught.value.reason is SigningReason.UNKNOWN_CHANNEL
            await payer.sign(allocation(1, 500), DOMAIN)
            for total in (100, 50, 100):
                assert await session.weigh(Voucher(channel(1), total), DOMAIN) is None
            assert await session.sign(Voucher(channel(1), 10), DOMAIN)
            with pytest.raises(SignerRefused):
                await session.weigh(Voucher(channel(1), 501), DOMAIN)

    run(main)


@BOTH
def test_what_waits_together_shares_a_commit(tmp_path: Path, opened: Open) -> None:
    """A hundred channels at once, far fewer commits; and each gets its own answer."""

    async def main() -> None:
        path = table_at(tmp_path)
        async with opened(path) as signers:
            await meet(signers)
            payer, session = signers[KeyRole.PAYER], signers[KeyRole.SESSION]
            got: dict[int, bytes] = {}

            async def one(salt: int) -> None:
                await payer.sign(allocation(salt, 1000), DOMAIN)
                for total in range(1, 6):
                    got[salt] = await session.sign(Voucher(channel(salt), total), DOMAIN)
                with pytest.raises(SignerRefused):
                    await session.sign(Voucher(channel(salt), 1001), DOMAIN)

            async with trio.open_nursery() as nursery:
                for salt in range(100):
                    nursery.start_soon(one, salt)
            for salt, signature in got.items():
                assert signature == KEYS[KeyRole.SESSION].sign(Voucher(channel(salt), 5).digest(DOMAIN))
        log = Table.open(path, {role: one.address for role, one in CLIENT.items()})
        assert len([mark for mark, _ in log.all() if mark[0] is Scope.VOUCHER]) == 100
        log.close()
        if isinstance(signers, LocalSigners):
            assert signers.core.table.commits < 200

    run(main)


@BOTH
def test_nothing_that_leaves_a_mark_is_signed_before_a_journal_was_shown(tmp_path: Path, opened: Open) -> None:
    async def main() -> None:
        async with opened(table_at(tmp_path), WORKER) as signers:
            hot = signers[KeyRole.WORKER]
            await hot.sign(Refusal(JobId(ZERO), 1, 1), MARKET_DOMAIN)  # leaves none
            with pytest.raises(SignerFailed, match="before a journal"):
                await hot.sign(receipt(1, 1), DOMAIN)

    run(main)


@BOTH
def test_the_network_identity_is_signed_for_without_the_key(tmp_path: Path, opened: Open) -> None:
    from libp2p.crypto.secp256k1 import Secp256k1PrivateKey

    async def main() -> None:
        async with opened(table_at(tmp_path), WORKER) as signers:
            hot = signers[KeyRole.WORKER]
            data = b"noise-libp2p-static-key:" + bytes(32)
            theirs = Secp256k1PrivateKey.new(KEYS[KeyRole.WORKER].secret_bytes())
            assert hot.sign_identity(data) == theirs.sign(data)
            assert theirs.get_public_key().verify(data, hot.sign_identity(data))
            for wrong in (b"", b"anything", bytes(32), receipt(1, 1).digest(DOMAIN)):
                with pytest.raises(SignerRefused):
                    hot.sign_identity(wrong)

    run(main)


@BOTH
def test_a_cancelled_caller_still_gets_its_answer(tmp_path: Path, opened: Open) -> None:
    """An ask that is under way is not given up: the caller would not know what was signed."""

    async def main() -> None:
        async with opened(table_at(tmp_path), WORKER) as signers:
            await meet(signers)
            with trio.CancelScope() as scope:
                scope.cancel()
                with pytest.raises(trio.Cancelled):
                    await signers[KeyRole.WORKER].sign(receipt(1, 1), DOMAIN)  # not begun
            signatures = []
            async with trio.open_nursery() as nursery:

                async def ask() -> None:
                    signatures.append(await signers[KeyRole.WORKER].sign(receipt(1, 2), DOMAIN))

                nursery.start_soon(ask)
                await trio.lowlevel.cancel_shielded_checkpoint()
                nursery.cancel_scope.cancel()
            assert len(signatures) == 1 or not signatures  # begun and answered, or never begun
            await signers[KeyRole.WORKER].sign(receipt(1, 2), DOMAIN)

    run(main)


# ------------------------------------------------------------------------------------------------------------- table


def accounts(keys: Any) -> dict[KeyRole, Address]:
    return {role: one.address for role, one in keys.items()}


def test_the_table_is_private_locked_and_bound_to_its_keys(tmp_path: Path) -> None:
    path = table_at(tmp_path)
    table = Table.open(path, accounts(CLIENT))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with pytest.raises(SignerLocked, match="in use by process"):
        Table.open(path, accounts(CLIENT))
    table.close()
    with pytest.raises(SignerError, match="other keys"):
        Table.open(path, accounts(WORKER))
    path.chmod(0o640)
    with pytest.raises(SignerError, match="0640"):
        Table.open(path, accounts(CLIENT))
    path.chmod(0o600)
    with pytest.raises(SignerError, match="no signer's table"):
        Table.open(tmp_path / "none.sqlite", accounts(CLIENT), create=False)


def test_a_journal_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "data" / "journal.sqlite"
    Ledger.open(path, chain_tag=bytes(20)).close()
    with pytest.raises(SignerError, match="no signer's table"):
        Table.open(path, accounts(CLIENT))


def test_a_changed_mark_is_noticed(tmp_path: Path) -> None:
    """A mark that somebody, or the disk, has lowered is not believed."""
    path = table_at(tmp_path)
    table = Table.open(path, accounts(CLIENT))
    table.store({(Scope.VOUCHER, bytes(32)): Mark(1000, b"\x01" * 32)})
    table.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE marks SET value = ?", ((10).to_bytes(16),))
    connection.close()
    table = Table.open(path, accounts(CLIENT))
    with pytest.raises(SignerFailed, match="damaged"):
        table.get((Scope.VOUCHER, bytes(32)))
    with pytest.raises(SignerFailed):  # and nothing goes on after it
        table.store({(Scope.VOUCHER, b"x"): Mark(1)})
    table.close()


def test_a_full_disk_ends_signing(tmp_path: Path) -> None:
    async def main() -> None:
        async with inline(table_at(tmp_path), WORKER) as signers:
            await meet(signers)
            await signers[KeyRole.WORKER].sign(receipt(1, 1), DOMAIN)
            signers.core.table._connection.execute("PRAGMA max_page_count = 1")
            signers.core.table._connection.execute("PRAGMA query_only = 1")
            for number in (2, 3):
                with pytest.raises(SignerFailed, match="could not be written"):
                    await signers[KeyRole.WORKER].sign(receipt(number, 1), DOMAIN)
            signers.core.table._connection.execute("PRAGMA query_only = 0")
            with pytest.raises(SignerFailed):  # not one more, although it could be written again
                await signers[KeyRole.WORKER].sign(receipt(4, 1), DOMAIN)
            for known in (receipt(1, 1), Refusal(JobId(ZERO), 1, 1)):  # nor what leaves no mark
                with pytest.raises(SignerFailed):
                    await signers[KeyRole.WORKER].sign(known, MARKET_DOMAIN if isinstance(known, Refusal) else DOMAIN)
            with pytest.raises(SignerFailed):
                signers[KeyRole.WORKER].sign_identity(b"noise-libp2p-static-key:" + bytes(32))
            assert signers.failure

    run(main)


def test_after_a_failed_store_nothing_is_signed_that_leaves_no_mark_either(tmp_path: Path) -> None:
    """A refusal, an offer or a quote moves no mark; the next request after the failure may be one, and so may libp2p's."""

    async def main() -> None:
        async with inline(table_at(tmp_path), WORKER) as signers:
            await meet(signers)
            hot = signers[KeyRole.WORKER]
            await hot.sign(receipt(1, 1), DOMAIN)
            signers.core.table._connection.execute("PRAGMA query_only = 1")
            with pytest.raises(SignerFailed):
                await hot.sign(receipt(2, 1), DOMAIN)
            for again in (Refusal(JobId(ZERO), 1, 1), MARKET_DOMAIN), (receipt(1, 1), DOMAIN):
                with pytest.raises(SignerFailed, match="could not be written"):
                    await hot.sign(*again)
            with pytest.raises(SignerFailed, match="could not be written"):
                hot.sign_identity(NOISE + bytes(32))

    run(main)


def test_the_cache_may_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.signer.table._CACHE", 4)
    table = Table.in_memory(accounts(WORKER))
    for n in range(20):
        table.store({(Scope.RECEIPTS, bytes([n])): Mark(n)})
    assert [table.get((Scope.RECEIPTS, bytes([n]))) for n in range(20)] == [Mark(n) for n in range(20)]
    assert table.get((Scope.RECEIPTS, b"none")) is None


# ----------------------------------------------------------------------------------------------------------- process


def test_the_key_is_in_no_argument_environment_or_node(tmp_path: Path) -> None:
    """S4, K11: the key file is opened by the signer; the node has its password for a moment, the key never."""

    async def main() -> None:
        store = Keystore(tmp_path / "keys", scrypt_n=1 << 12)
        made = store.create("worker", b"a password")
        source = {KeyRole.WORKER: KeyFile(str(store.path("worker")), b"a password")}
        async with open_process(source, POLICY, table_at(tmp_path)) as signers:
            assert signers[KeyRole.WORKER].address == made.address
            (child,) = children()
            for name in ("cmdline", "environ"):
                try:
                    data = Path(f"/proc/{child}/{name}").read_bytes()
                except PermissionError:
                    continue  # not dumpable: even its owner may not look
                assert made.secret_bytes() not in data and made.secret_bytes().hex().encode() not in data
                assert b"a password" not in data
            if os.geteuid() == 0:
                assert Path(f"/proc/{child}").stat().st_uid == 0
            limits = Path(f"/proc/{child}/limits").read_text()
            assert "Max core file size        0                    0" in limits
            status = Path(f"/proc/{child}/status").read_text()
            assert "NoNewPrivs:\t1" in status
        assert "a password" not in repr(source) and made.secret_bytes().hex() not in repr(RawKey(made.secret_bytes()))

    run(main)


def children() -> list[int]:
    found = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(one) for one in found if b"node.signer" in Path(f"/proc/{one}/cmdline").read_bytes()]


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        (lambda path: KeyFile(str(path), b"another"), KeyError_, "wrong password"),
        (lambda path: KeyFile(str(path) + "x", b"a password"), KeyError_, "there is no key"),
        (lambda path: RawKey(bytes(32)), SignerError, "private key is 32 bytes"),
    ],
)
def test_what_keeps_a_signer_from_starting_is_told_by_its_name(
    tmp_path: Path, source: Any, error: type[Exception], match: str
) -> None:
    async def main() -> None:
        store = Keystore(tmp_path / "keys", scrypt_n=1 << 12)
        store.create("worker", b"a password")
        with pytest.raises(error, match=match):
            async with open_process({KeyRole.WORKER: source(store.path("worker"))}, POLICY, table_at(tmp_path)):
                pass
        assert children() == []

    run(main)


def test_two_signers_of_one_table(tmp_path: Path) -> None:
    async def main() -> None:
        async with in_process(table_at(tmp_path)):
            with pytest.raises(SignerLocked, match="in use"):
                async with in_process(table_at(tmp_path)):
                    pass

    run(main)


def test_a_signer_that_was_killed_is_missed_at_once_and_by_all(tmp_path: Path) -> None:
    async def main() -> None:
        async with in_process(table_at(tmp_path), WORKER) as signers:
            await meet(signers)
            hot, failed = signers[KeyRole.WORKER], []

            async def ask(number: int) -> None:
                try:
                    for n in range(1000):
                        await hot.sign(receipt(number * 1000 + n, 1), DOMAIN)
                except SignerFailed as error:
                    failed.append(error)

            async with trio.open_nursery() as nursery:
                for number in range(1, 9):
                    nursery.start_soon(ask, number)
                await trio.sleep(0.05)
                os.kill(children()[0], signal.SIGKILL)
            assert len(failed) == 8
            assert signers.failure
            with pytest.raises(SignerFailed):
                await hot.sign(receipt(1, 1), DOMAIN)
            with pytest.raises(SignerFailed):
                hot.sign_identity(b"libp2p-pubsub:x")
        async with in_process(table_at(tmp_path), WORKER) as signers:  # a new start reads the marks
            await meet(signers)
            with pytest.raises(SignerRefused):
                await signers[KeyRole.WORKER].sign(receipt(1000, 2), DOMAIN)

    run(main)


NOISE = b"noise-libp2p-static-key:"


def test_a_late_answer_is_never_taken_for_that_of_the_next_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signer hangs over an identity question and comes back. Read as the answer to what was asked next, its late answer would
    put every later signature under the wrong message."""
    monkeypatch.setattr("node.signer.client.IDENTITY_S", 0.5)

    async def main() -> None:
        async with in_process(table_at(tmp_path), WORKER) as signers:
            hot, (child,) = signers[KeyRole.WORKER], children()
            first = hot.sign_identity(NOISE + b"a" * 32)
            os.kill(child, signal.SIGSTOP)
            with pytest.raises(SignerFailed, match="does not answer"):
                hot.sign_identity(NOISE + b"a" * 32)
            os.kill(child, signal.SIGCONT)
            await trio.sleep(0.1)
            for other in (b"b", b"c"):
                with pytest.raises(SignerFailed):
                    assert hot.sign_identity(NOISE + other * 32) != first
            assert signers.failure  # the worker stops on it
            with pytest.raises(SignerFailed):
                await hot.sign(Refusal(JobId(ZERO), 1, 1), MARKET_DOMAIN)

    run(main)


def test_an_answer_to_another_question_ends_the_line(tmp_path: Path) -> None:
    """Whatever put it there: an answer is believed by its number."""

    async def main() -> None:
        async with in_process(table_at(tmp_path), WORKER) as signers:
            hot = signers[KeyRole.WORKER]
            hot.sign_identity(NOISE + b"a" * 32)
            signers._identity_next += 1
            question = bytes(8) + b"\x06worker" + NOISE + b"b" * 32
            signers._identity.sendall(encode_frame(question, 1 << 16))
            with pytest.raises(SignerFailed, match="another question"):
                hot.sign_identity(NOISE + b"c" * 32)
            assert signers.failure

    run(main)


def test_a_signer_that_hangs_fails_what_was_asked_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.signer.client.ASK_S", 0.3)
    monkeypatch.setattr("node.signer.client.GRACE_S", 0.1)

    async def main() -> None:
        async with in_process(table_at(tmp_path), WORKER) as signers:
            await meet(signers)
            hot, (child,) = signers[KeyRole.WORKER], children()
            os.kill(child, signal.SIGSTOP)
            with trio.fail_after(5):
                with pytest.raises(SignerFailed, match="has not answered"):
                    await hot.sign(receipt(1, 1), DOMAIN)
            os.kill(child, signal.SIGCONT)
            await trio.sleep(0.1)  # its late answer is nobody's
            assert signers.failure and not signers._answers
            with pytest.raises(SignerFailed):
                await hot.sign(receipt(2, 1), DOMAIN)

    run(main)


def test_whoever_asks_a_signer_that_hangs_may_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the signer is not given up for it: when it is back, everybody else has their own answers."""
    monkeypatch.setattr("node.signer.client.GRACE_S", 0.2)

    async def main() -> None:
        async with in_process(table_at(tmp_path), WORKER) as signers:
            await meet(signers)
            hot, (child,) = signers[KeyRole.WORKER], children()
            got: list[bytes] = []

            async def patient() -> None:
                got.append(await hot.sign(receipt(2, 1), DOMAIN))

            async with trio.open_nursery() as nursery:
                os.kill(child, signal.SIGSTOP)
                with trio.fail_after(5), trio.move_on_after(0.1) as scope:
                    nursery.start_soon(patient)
                    await hot.sign(receipt(1, 1), DOMAIN)
                assert scope.cancelled_caught
                os.kill(child, signal.SIGCONT)
            assert got == [KEYS[KeyRole.WORKER].sign(receipt(2, 1).digest(DOMAIN))]
            assert signers.failure is None and not signers._answers and not signers._waiting
            assert await hot.sign(receipt(1, 1), DOMAIN)

    run(main)


def test_a_caller_that_is_cancelled_hears_what_a_signer_that_is_well_has_signed(tmp_path: Path) -> None:
    """Its answer is a few milliseconds away: without it a voucher would be signed that nobody has journaled."""

    async def main() -> None:
        async with in_process(table_at(tmp_path), WORKER) as signers:
            await meet(signers)
            hot, (child,) = signers[KeyRole.WORKER], children()
            got: list[bytes] = []

            async def ask() -> None:
                got.append(await hot.sign(receipt(1, 1), DOMAIN))

            async def wake() -> None:
                await trio.sleep(0.2)
                os.kill(child, signal.SIGCONT)

            async with trio.open_nursery() as outer, trio.open_nursery() as nursery:
                os.kill(child, signal.SIGSTOP)
                nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                outer.start_soon(wake)
                nursery.cancel_scope.cancel()
            assert got == [KEYS[KeyRole.WORKER].sign(receipt(1, 1).digest(DOMAIN))]

    run(main)


def test_the_signer_dies_with_its_node(tmp_path: Path) -> None:
    script = f"""
import os, sys, trio
from pathlib import Path
from node.signer.client import open_process
from node.signer.sources import RawKey
from protocol.signing import KeyRole, Policy
async def main():
    async with open_process({{KeyRole.WORKER: RawKey(bytes(31) + b"\\1")}}, Policy(), Path({str(table_at(tmp_path))!r})):
        task = Path(f"/proc/{{os.getpid()}}/task/{{os.getpid()}}/children").read_text().split()
        print(task[0], flush=True)
        await trio.sleep_forever()
trio.run(main)
"""
    node = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    )
    assert node.stdout is not None
    child = int(node.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    node.kill()
    node.wait()
    node.stdout.close()

    async def gone() -> None:
        while alive(child):
            await trio.sleep(0.01)

    run(gone)


ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def alive(pid: int) -> bool:
    """Running; a zombie that nobody has fetched yet is dead."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_node_that_talks_nonsense_ends_its_signer(tmp_path: Path) -> None:
    async def main() -> None:
        for nonsense in (b"\x00\x00\x00\x03abc", b"\xff\xff\xff\xff", b"\x00\x00\x00\x02\x91\xa5"):
            async with in_process(table_at(tmp_path), WORKER) as signers:
                await meet(signers)
                await signers._stream.send_all(nonsense)
                with pytest.raises(SignerFailed, match=r"no message|ended"):
                    for number in range(1, 1000):
                        await signers[KeyRole.WORKER].sign(receipt(number, 1), DOMAIN)
                        await trio.sleep(0.01)

    run(main)


def test_the_module_is_nobodys_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "node.signer"], capture_output=True, text=True, cwd=ROOT, env=environment(), check=False
    )
    assert done.returncode == 1 and "a node starts it itself" in done.stderr


# ----------------------------------------------------------------------------------------------- kills at named points


@pytest.mark.parametrize("passage", [1, 2, 4])
@pytest.mark.parametrize("point", ["signer.before_insert", "signer.before_commit", "signer.after_insert"])
def test_killed_at_a_named_point_never_signs_two_ways(
    tmp_path: Path, point: str, passage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K9. The signer dies at the point; after the next start it is asked for the same numbers with other contents.

    What was handed out must be the only signature under its number.
    """
    path = table_at(tmp_path)
    out: dict[int, tuple[Receipt, bytes]] = {}
    vouchers: list[int] = []

    async def before() -> None:
        async with in_process(path, {**WORKER, **CLIENT}) as signers:
            await meet(signers)
            await signers[KeyRole.PAYER].sign(allocation(1, 1000), DOMAIN)
        monkeypatch.setenv("GRISTMILL_TESTING", "1")
        # One passage belongs to the meeting at the start.
        monkeypatch.setenv("GRISTMILL_FAULT", f"{point}:{passage + 1}")
        async with in_process(path, {**WORKER, **CLIENT}) as signers:
            await meet(signers)
            with pytest.raises(SignerFailed):
                for number in range(1, 10):
                    asked = receipt(number, 1)
                    out[number] = (asked, await signers[KeyRole.WORKER].sign(asked, DOMAIN))
                    await signers[KeyRole.SESSION].sign(Voucher(channel(1), number * 10), DOMAIN)
                    vouchers.append(number * 10)

    async def after() -> None:
        async with in_process(path, {**WORKER, **CLIENT}) as signers:
            await meet(signers)
            for number in range(1, 10):
                other = receipt(number, 2)
                try:
                    await signers[KeyRole.WORKER].sign(other, DOMAIN)
                    assert number not in out, f"two receipts with number {number}"
                except SignerRefused as no:
                    assert no.reason is SigningReason.EQUIVOCATION
            for asked, signature in out.values():
                assert await signers[KeyRole.WORKER].sign(asked, DOMAIN) == signature
            top = vouchers[-1] if vouchers else -1
            if top > 0:
                with pytest.raises(SignerRefused):
                    await signers[KeyRole.SESSION].sign(Voucher(channel(1), top - 1), DOMAIN)

    run(before)
    monkeypatch.delenv("GRISTMILL_FAULT")
    run(after)


def test_signing_before_the_commit_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug of the test above: a table that forgets. The same question must then find two receipts."""
    path = table_at(tmp_path)

    async def main() -> None:
        async with inline(path, WORKER) as signers:
            await meet(signers)
            monkeypatch.setattr(signers.core.table, "store", lambda changes: None)
            await signers[KeyRole.WORKER].sign(receipt(1, 1), DOMAIN)
        async with inline(path, WORKER) as signers:
            await meet(signers)
            await signers[KeyRole.WORKER].sign(receipt(1, 2), DOMAIN)  # signed two ways: what must never happen

    run(main)


# -------------------------------------------------------------------------------------------------- durable, then signed

SIGNS = """
import os, sys, trio
from pathlib import Path
from node.signer.keys import Follow
from node.signer.local import open_local
from node.store import database
from protocol.identity import IdentityMessage
from protocol.ids import *
from protocol.keys import PrivateKey
from protocol.signing import *
from protocol.typed_data import *

if sys.argv[2] == "normal":  # the planted bug: nothing waits for the disk
    database.SETTINGS += (("synchronous", "NORMAL"),)
    database.REQUIRED = ()
here = Domain(1, Address(bytes(20)))
zero = Hash32(bytes(32))

async def main():
    policy = Policy(domains=(DomainRule("Receipt", 1, bytes(20)),))
    signers = open_local({KeyRole.WORKER: PrivateKey(bytes(31) + b"\\1")}, policy, Path(sys.argv[1]))
    await signers.meet([], Mark(0, bytes(32)), adopting=True, following=Follow())
    for n in range(1, 6):
        receipt = Receipt(JobId(zero), 0, ChannelId(zero), n, ModelId(zero), zero, zero, zero, 1, 2, 3, zero, 1, 2, 0)
        os.write(1, b"ack %s\\n" % (await signers[KeyRole.WORKER].sign(receipt, here)).hex().encode())

trio.run(main)
"""


def strace_works() -> bool:
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "true"]
    return shutil.which("strace") is not None and subprocess.run(command, check=False).returncode == 0


@pytest.mark.skipif(not strace_works(), reason="strace is not installed or may not trace here")
@pytest.mark.parametrize(("mode", "early"), [("full", 0), ("normal", 5)])
def test_the_disk_has_the_mark_before_anybody_has_the_signature(tmp_path: Path, mode: str, early: int) -> None:
    """K9, in the system calls; with `synchronous=NORMAL` the same look must find every signature too early."""
    path, log = table_at(tmp_path), tmp_path / "calls"
    tracing = ["strace", "-f", "-y", "-qq", "-s", "8", "-o", str(log), "-e", "trace=pwrite64,fdatasync,fsync,write"]
    subprocess.run([*tracing, sys.executable, "-c", SIGNS, str(path), mode], cwd=ROOT, env=environment(), check=True)
    dirty, found = False, []
    for line in log.read_text().splitlines():
        if "-wal>" in line and "pwrite64(" in line:
            dirty = True
        elif "-wal>" in line and ("fdatasync(" in line or "fsync(" in line):
            dirty = False
        elif '"ack ' in line:
            found.append(dirty)
    assert len(found) == 5 and sum(found) == early


# ----------------------------------------------------------------------------------------------------------- journal


def known(**values: int) -> KnownChannel:
    return KnownChannel(CHANNEL, TOKEN, DOMAIN, **values)


def journal(tmp_path: Path, name: str = "journal") -> Ledger:
    return Ledger.open(tmp_path / "data" / f"{name}.sqlite", chain_tag=bytes(20))


async def serve(tmp_path: Path, ledger: Ledger, *numbers: int, signed: int = 0, given: int | None = None) -> None:
    """One life of a worker: held against its journal, it signs these receipts and journals each."""
    async with inline(table_at(tmp_path), WORKER) as signers:
        await attach(signers, ledger, [known(signed=signed, given=signed if given is None else given)])
        for number in numbers:
            await ledger.append([Entry("part", b"", {"n": number})])
            await signers[KeyRole.WORKER].sign(receipt(number, 1), DOMAIN)


def copy(source: Path, to: Path) -> None:
    with sqlite3.connect(source) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("VACUUM INTO ?", (str(to),))
    connection.close()
    with sqlite3.connect(to) as connection:
        connection.execute("PRAGMA journal_mode = wal")
    connection.close()
    to.chmod(0o600)


def test_a_journal_and_its_table_go_on_together(tmp_path: Path) -> None:
    async def main() -> None:
        with journal(tmp_path) as ledger:
            await serve(tmp_path, ledger, 1, 2)
            await serve(tmp_path, ledger, 3, signed=2, given=3)
            begun = [record for record in ledger.records() if record.kind == BEGUN]
            assert len(begun) == 1

    run(main)


def test_an_old_copy_of_the_journal_is_noticed(tmp_path: Path) -> None:
    """K10. The witness is a record that the journal had when something was signed."""

    async def main() -> None:
        with journal(tmp_path) as ledger:
            await serve(tmp_path, ledger, 1, 2)
        copy(tmp_path / "data" / "journal.sqlite", tmp_path / "data" / "backup.sqlite")
        with journal(tmp_path) as ledger:
            await serve(tmp_path, ledger, 3, 4, signed=2, given=4)
        with journal(tmp_path, "backup") as ledger:
            with pytest.raises(SignerOutdated, match="it is an old copy") as caught:
                await serve(tmp_path, ledger, 3, signed=2)
            assert "newest copy" in caught.value.hint
            for n in range(10):  # it goes on by itself and becomes longer
                await ledger.append([Entry("part", b"", {"n": n})])
            with pytest.raises(SignerOutdated, match="another copy"):
                await serve(tmp_path, ledger, 3, signed=2)

    run(main)


def test_an_old_copy_of_the_table_is_noticed(tmp_path: Path) -> None:
    async def main() -> None:
        with journal(tmp_path) as ledger:
            await serve(tmp_path, ledger, 1, 2)
            copy(table_at(tmp_path), tmp_path / "old.sqlite")
            await serve(tmp_path, ledger, 3, signed=2, given=3)
            os.replace(tmp_path / "old.sqlite", table_at(tmp_path))
            with pytest.raises(SignerOutdated, match=f"receipt 3 of channel {CHANNEL}") as caught:
                await serve(tmp_path, ledger, 4, signed=3, given=4)
            assert "forget-signer" in caught.value.hint

    run(main)


def test_a_lost_table_is_noticed_and_another_is_no_substitute(tmp_path: Path) -> None:
    async def main() -> None:
        with journal(tmp_path) as ledger:
            await serve(tmp_path, ledger, 1, 2)
            table_at(tmp_path).rename(tmp_path / "lost.sqlite")
            with pytest.raises(SignerOutdated, match="another signer's table"):
                await serve(tmp_path, ledger, 3, signed=2)
            (tmp_path / "lost.sqlite").rename(table_at(tmp_path))
            await serve(tmp_path, ledger, 3, signed=2)

    run(main)


def test_a_forgotten_table_is_begun_anew_from_the_journal(tmp_path: Path) -> None:
    async def main() -> None:
        with journal(tmp_path) as ledger:
            await serve(tmp_path, ledger, 1, 2)
            table_at(tmp_path).unlink()
            await ledger.append([Entry(BEGUN, b"", {"table": b""})])
            await serve(tmp_path, ledger, 5, signed=2, given=4)  # 3 and 4 were given, and perhaps signed
            async with inline(table_at(tmp_path), WORKER) as signers:
                await attach(signers, ledger, [known(signed=5, given=5)])
                for number in (1, 2, 3, 4):
                    with pytest.raises(SignerRefused):
                        await signers[KeyRole.WORKER].sign(receipt(number, 9), DOMAIN)

    run(main)


@pytest.mark.parametrize("table_too", [False, True])
def test_an_old_journal_whose_owner_goes_on_with_it(tmp_path: Path, table_too: bool) -> None:
    """After `journal adopt --accept-loss` the marks stand above the journal, or begin with it; no number comes twice."""

    async def main() -> None:
        with journal(tmp_path) as ledger:
            await serve(tmp_path, ledger, 1, 2)
        copy(tmp_path / "data" / "journal.sqlite", tmp_path / "data" / "backup.sqlite")
        copy(table_at(tmp_path), tmp_path / "old.sqlite")
        with journal(tmp_path) as ledger:
            await serve(tmp_path, ledger, 3, signed=2)
        if table_too:
            os.replace(tmp_path / "old.sqlite", table_at(tmp_path))
        with journal(tmp_path, "backup") as ledger:
            await ledger.append([Entry(ADOPTED, b"", {})])
            for channels in ([known(signed=2, given=2)], []):
                async with inline(table_at(tmp_path), WORKER) as signers:
                    await attach(signers, ledger, channels)
                    for number in (1, 2) if table_too else (1, 2, 3):
                        with pytest.raises(SignerRefused):
                            await signers[KeyRole.WORKER].sign(receipt(number, 9), DOMAIN)

    run(main)


def test_a_journal_from_before_there_were_signers_is_adopted(tmp_path: Path) -> None:
    """And a crash between the first marks and the journal's record of them does no harm."""

    async def main() -> None:
        with journal(tmp_path) as ledger:
            await ledger.append([Entry("part", b"", {"n": 1})])
            async with inline(table_at(tmp_path), WORKER) as signers:
                await meet(signers, [known(signed=7, given=9)])
            async with inline(table_at(tmp_path), WORKER) as signers:
                await attach(signers, ledger, [known(signed=7, given=9)])
                with pytest.raises(SignerRefused):
                    await signers[KeyRole.WORKER].sign(receipt(9, 1), DOMAIN)
                await signers[KeyRole.WORKER].sign(receipt(10, 1), DOMAIN)

    run(main)


@BOTH
def test_an_old_table_is_noticed_by_words_and_transactions_alone(tmp_path: Path, opened: Open) -> None:
    """K10 where no channel went on: with the old copy the day's limit would begin anew and a nonce be free again."""

    async def main() -> None:
        with journal(tmp_path) as ledger:
            for nonce in (0, 1):
                async with opened(table_at(tmp_path)) as signers:
                    await attach(signers, ledger, [])
                    await pay(signers[KeyRole.PAYER], ledger, nonce)
                if nonce == 0:
                    copy(table_at(tmp_path), tmp_path / "old.sqlite")
            os.replace(tmp_path / "old.sqlite", table_at(tmp_path))
            async with opened(table_at(tmp_path)) as signers:
                with pytest.raises(SignerOutdated, match="transaction 1 on chain 31337") as caught:
                    await attach(signers, ledger, [])
                assert "forget-signer" in caught.value.hint
            table_at(tmp_path).unlink()
            await ledger.append([Entry(BEGUN, b"", {"table": b""})])
            for _ in range(2):  # begun anew with the journal's marks, and again with them
                async with opened(table_at(tmp_path)) as signers:
                    await attach(signers, ledger, [])

    run(main)


@BOTH
def test_many_words_are_shown_in_parts(tmp_path: Path, opened: Open) -> None:
    words = [word_of(Acceptance(JobId(n.to_bytes(32)), ZERO, n), DOMAIN) for n in range(2500)]

    async def main() -> None:
        async with opened(table_at(tmp_path)) as signers:
            await signers.meet([], Mark(0, bytes(32)), adopting=True, words=words[:-1], following=Follow())
        async with opened(table_at(tmp_path)) as signers:
            with pytest.raises(SignerOutdated, match=f"acceptance of job {words[-1].key[1]}"):
                await signers.meet([], Mark(0, bytes(32)), adopting=False, words=words, following=Follow())

    run(main)


def test_a_journal_that_sent_before_its_table_was_begun_is_no_reason_to_stop(tmp_path: Path) -> None:
    """A table begun by an earlier version took no words over: what left before it began is not asked for."""

    async def main() -> None:
        with journal(tmp_path) as ledger:
            async with inline(tmp_path / "first" / "client.sqlite") as signers:
                await attach(signers, ledger, [])
                await pay(signers[KeyRole.PAYER], ledger, 0)
            async with inline(table_at(tmp_path)) as signers:
                await meet(signers)
                await ledger.append([Entry(BEGUN, b"", {"table": signers.table})])
            async with inline(table_at(tmp_path)) as signers:
                await attach(signers, ledger, [])

    run(main)


async def pay(payer: Any, ledger: Ledger, nonce: int) -> None:
    tx = Transaction(DOMAIN.chain_id, nonce, 1, 100, 21_000, Address(b"\x09" * 20), 0, b"\x01\x02\x03\x04")
    signed = await payer.sign_transaction(tx)
    await ledger.append([Entry("tx_signed", bytes(payer.address), PendingTx("pay", signed).to_body())])


@BOTH
def test_the_caller_hears_what_it_forgot_in_a_crash(tmp_path: Path, opened: Open) -> None:
    """A voucher that was signed and not journaled never left; the next one must be above it, and the client knows."""

    async def main() -> None:
        with journal(tmp_path) as ledger:
            async with opened(table_at(tmp_path)) as signers:
                await attach(signers, ledger, [])
                await signers[KeyRole.PAYER].sign(allocation(1, 1000), DOMAIN)
                await signers[KeyRole.SESSION].sign(Voucher(channel(1), 40), DOMAIN)
            async with opened(table_at(tmp_path)) as signers:
                forgot = KnownChannel(channel(1), TOKEN, DOMAIN, authorized=1000, valid_before=1, cumulative=30)
                ahead = await attach(signers, ledger, [forgot])
                assert ahead[channel(1)].voucher == 40 and ahead[channel(1)].allocation == 0

    run(main)


@BOTH
def test_many_channels_are_shown_in_parts(tmp_path: Path, opened: Open) -> None:
    async def main() -> None:
        with journal(tmp_path) as ledger:
            many = [
                KnownChannel(ChannelId(n.to_bytes(32)), TOKEN, DOMAIN, authorized=9, cumulative=n % 9)
                for n in range(2500)
            ]
            for _ in range(2):
                async with opened(table_at(tmp_path)) as signers:
                    assert await attach(signers, ledger, many) == {}
                    with pytest.raises(SignerRefused):
                        await signers[KeyRole.SESSION].sign(Voucher(many[8].channel_id, 7), DOMAIN)

    run(main)


def test_identity_messages_have_no_other_way_in() -> None:
    """What the identity line takes is decoded by the same strict reader."""
    with pytest.raises(Exception, match="Noise keys, gossip and peer records"):
        IdentityMessage.decode(Close(CHANNEL, 1).digest(DOMAIN))
