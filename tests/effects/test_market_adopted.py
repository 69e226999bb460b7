"""A journal that was adopted in place of a lost later one signs nothing that the lost one may have signed (invariant J6)."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from node.audit import audit
from node.client.client import Client
from node.errors import Refused, WorkerFault
from node.store import channels as books
from node.store.ledger import ADOPTED, Entry, Ledger
from node.testing.market import Market, run_market
from node.worker.worker import Worker
from protocol.channel import JobOpened, Role
from protocol.errors import LocalProtocolError, RefusalReason
from protocol.ids import JobId

HELLO = [{"role": "user", "content": "hello there"}]


async def greet(client: Client) -> int:
    async with client.chat("fake", HELLO) as stream:
        await stream.text()
    return stream.cost


def adopt(journal: Path, account: bytes, backup: Path | None) -> None:
    """What `gristmill journal adopt` does, on a backup or on nothing at all."""
    if backup is None:
        shutil.rmtree(journal.parent)
    else:
        shutil.copy(backup, journal)
        for suffix in ("-wal", "-shm"):
            journal.with_name(journal.name + suffix).unlink(missing_ok=True)
    with Ledger.open(journal, chain_tag=account) as ledger:
        ledger.append_sync([Entry(ADOPTED, b"", {})])


def backup(node: Worker | Client) -> Path:
    journal = node.book.ledger.path
    copy = journal.with_name("backup")
    with closing(sqlite3.connect(journal)) as connection:
        connection.execute("VACUUM INTO ?", (str(copy),))
    copy.chmod(0o600)
    return copy


@pytest.mark.parametrize("all_is_lost", [False, True])
def test_a_worker_never_gives_a_receipt_number_twice(all_is_lost: bool) -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(name="w"), await market.client(name="c")
        await greet(client)
        (old,) = client.book.channels
        journal, account, copy = worker.ledger.path, bytes(worker.key.address), backup(worker)
        table = market.copy_table("w")
        await greet(client)
        market.crash(worker)
        market.put_back_table("w", table)  # a backup has both; else the signer would say no in the book's place
        kept = copy.rename(market.folder / "kept")
        adopt(journal, account, None if all_is_lost else kept)

        again = await market.worker(name="w")
        await client.meet(again.network.addresses[0])
        with pytest.raises(Refused) as no:
            await greet(client)
        if all_is_lost:
            assert old not in again.book.channels
            with pytest.raises(WorkerFault, match="lost its books"):
                await client.wallet.locking.submit(again.key.peer_id, old)
        else:
            assert no.value.reason is RefusalReason.CHANNEL_CLOSING
            assert again.book.frozen == {old}
            with pytest.raises(LocalProtocolError, match="frozen"):
                await again.book.change([JobOpened(old, JobId(bytes(32)), 0, 2, 0)])
            await again.claim()
            assert again.book.channels[old].claimed > 0, "what the old vouchers cover is still earned"

        stranger = await market.client()
        assert await greet(stranger) > 0
        (fresh,) = stranger.book.channels
        assert again.book.channels[fresh].sequence == 1

    run_market(test)


def test_a_client_leaves_its_old_channels() -> None:
    async def test(market: Market) -> None:
        await market.worker(name="w")
        client = await market.client(name="c")
        await greet(client)
        (old,) = client.book.channels
        copy = backup(client)
        vouched = client.book.channels[old].cumulative
        await greet(client)
        journal, account = client.book.ledger.path, bytes(client.wallet.payer.address)
        market.crash(client)
        adopt(journal, account, copy.rename(market.folder / "kept"))

        again = await market.client(name="c", deposit=0)
        assert again.book.frozen == {old}
        for _ in range(2):
            await greet(again)
        (fresh,) = set(again.book.channels) - {old}
        assert again.book.channels[old].cumulative == vouched, "nothing more is signed on it"
        assert again.book.channels[fresh].spent > 0
        assert await audit(again.book.ledger, Role.CLIENT, again.wallet.chains) == []

    run_market(test)


def test_planted_the_record_of_an_adoption_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "ADOPTED", "something else")
    for test in (
        lambda: test_a_worker_never_gives_a_receipt_number_twice(False),
        test_a_client_leaves_its_old_channels,
    ):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            test()
