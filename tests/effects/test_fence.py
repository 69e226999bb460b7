"""Invariant J5: of all copies of a key's journal on one machine, one goes on. An old backup and a second copy are refused.

Each way to have two journals is played, and each part of the mark (epoch, token, seq, hash, the running mark) is shown to be
needed: with it planted away the copy gets in.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from node.store import errors
from node.store.fence import Fence, Mark
from node.store.ledger import ADOPTED, Entry, Ledger

TAG = b"\x11" * 20


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


class Machine:
    """A place for data dirs, with one fence outside of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fence = folder / "state" / "fence" / "worker-0x11.json"

    def journal(self, name: str = "data") -> Path:
        return self.folder / name / "journal.sqlite"

    def open(self, name: str = "data", *, adopt: bool = False) -> Ledger:
        return Ledger.open(self.journal(name), chain_tag=TAG, fence=Fence(self.fence, adopt=adopt))

    def live(self, name: str = "data", records: int = 3) -> None:
        """One life of a journal, closed cleanly."""
        with self.open(name) as ledger:
            write(ledger, records)

    def copy(self, source: str = "data", to: str = "copy") -> None:
        """Of a journal that nobody writes to at the moment."""
        shutil.rmtree(self.folder / to, ignore_errors=True)
        shutil.copytree(self.folder / source, self.folder / to)

    def refused(self, name: str = "copy") -> errors.LedgerFenced:
        with pytest.raises(errors.LedgerFenced) as caught:
            self.open(name)
        return caught.value


def write(ledger: Ledger, records: int, kind: str = "t") -> None:
    for n in range(records):
        ledger.append_sync([Entry(kind, b"", {"n": n})])


def kill(ledger: Ledger) -> None:
    """What a kill -9 leaves: the locks are gone, nothing was closed, checkpointed or synced."""
    for held in (ledger._fence, ledger._lock):
        assert held is not None
        held.release()


# What passes


def test_every_open_is_an_epoch_and_a_journal_passes_its_own_fence(machine: Machine) -> None:
    for epoch in range(1, 6):
        with machine.open() as ledger:
            assert ledger.epoch == epoch
            write(ledger, epoch % 3)
    assert machine.fence.stat().st_mode & 0o777 == 0o600
    assert machine.fence.parent.stat().st_mode & 0o777 == 0o700
    with Ledger.open(machine.journal(), chain_tag=TAG, read_only=True) as reader:
        assert reader.epoch == 0


def test_without_a_fence_epochs_still_rise(machine: Machine) -> None:
    for epoch in (1, 2):
        with Ledger.open(machine.journal(), chain_tag=TAG) as ledger:
            assert ledger.epoch == epoch


def test_a_moved_journal_goes_on(machine: Machine) -> None:
    machine.live()
    (machine.folder / "data").rename(machine.folder / "moved")
    machine.live("moved")


def test_after_a_kill_the_journal_goes_on(machine: Machine) -> None:
    for n in range(3):
        ledger = machine.open()
        write(ledger, n)
        kill(ledger)
    machine.live()


def test_a_fence_that_a_power_cut_took_back_lets_its_journal_pass(machine: Machine) -> None:
    """The journal is ahead of the fence: by records, by an epoch, or by both."""
    machine.live()
    before = machine.fence.read_bytes()
    machine.live()
    machine.fence.write_bytes(before)
    machine.live()
    with machine.open() as ledger:
        begun = machine.fence.read_bytes()
        write(ledger, 5)
    machine.fence.write_bytes(begun)
    machine.live()
    machine.fence.unlink()  # a new machine: nothing is known, the journal is believed
    machine.live()


def test_a_torn_slot_leaves_the_other_mark(machine: Machine) -> None:
    machine.live()
    machine.live()
    whole = machine.fence.read_bytes()
    for slot in (0, 1):
        for harm in (b"", b"\0" * 1024, b"{" * 1024, whole[slot * 1024 : slot * 1024 + 512] + b"\0" * 512):
            machine.fence.write_bytes(whole[: slot * 1024] + harm.ljust(1024, b"\0") + whole[(slot + 1) * 1024 :])
            machine.open().close()
            machine.fence.write_bytes(whole)  # older than the journal: passes


def test_one_bit_of_a_mark_does_not_make_another_mark(machine: Machine) -> None:
    """Else a flipped digit would refuse the right journal."""
    machine.live()
    raw = bytearray(machine.fence.read_bytes())
    at = raw.index(b'"seq":3') + 6
    raw[at] ^= 4
    assert b'"seq":7' in raw
    machine.fence.write_bytes(raw)
    machine.live()


def test_any_path_fits_a_mark(machine: Machine) -> None:
    name = "päth \"with\\ quotes' " + "\u20ac" * 30 + os.fsdecode(b"\xff")
    for part in (name, "/".join(["x" * 90] * 4)):
        fence = Fence(machine.fence)
        with Ledger.open(machine.folder / part / "j.sqlite", chain_tag=TAG, fence=fence) as ledger:
            write(ledger, 1)
        machine.fence.unlink()


# What is refused


def test_an_old_backup_is_refused(machine: Machine) -> None:
    machine.live()
    machine.copy()
    machine.live()
    refusal = machine.refused()
    assert "has 3 records" in refusal.message and "has 6" in refusal.message
    assert str(machine.journal()) in refusal.message
    assert "adopt" in refusal.hint
    machine.live()  # the right one goes on


def test_a_copy_is_refused_although_both_have_the_same_records(machine: Machine) -> None:
    machine.live()
    machine.copy()
    machine.open().close()
    machine.refused()


def test_of_two_copies_the_first_to_open_goes_on(machine: Machine) -> None:
    machine.live()
    machine.copy()
    machine.live("copy")
    assert str(machine.journal("copy")) in machine.refused("data").message


def test_a_copy_that_has_signed_as_much_is_refused(machine: Machine) -> None:
    """Same number of opens, more records, other content: the two met the fence while nobody looked."""
    machine.live()
    machine.copy()
    machine.live()
    mark = machine.fence.read_bytes()
    machine.fence.unlink()
    machine.live("copy", records=9)
    machine.fence.write_bytes(mark)
    machine.refused("copy")
    machine.live()


def test_a_copy_is_refused_while_the_original_runs(machine: Machine) -> None:
    machine.live()
    machine.copy()
    with machine.open(), pytest.raises(errors.LedgerLocked, match=f"process {os.getpid()}") as caught:
        machine.open("copy")
    assert "--data-dir" not in caught.value.hint  # another data dir would not help
    machine.refused("copy")


def test_a_backup_from_within_the_last_life_is_refused_after_a_kill(machine: Machine) -> None:
    ledger = machine.open()
    write(ledger, 4)
    machine.copy()
    write(ledger, 1)
    kill(ledger)
    machine.refused()
    machine.live()


def test_a_new_journal_is_not_begun_where_the_old_one_was(machine: Machine) -> None:
    machine.live()
    shutil.rmtree(machine.folder / "data")
    assert "is missing" in machine.refused("data").message
    assert not machine.journal().exists()


def test_a_journal_from_before_there_were_epochs_is_an_old_one_afterwards(machine: Machine) -> None:
    import gzip

    released = gzip.decompress((Path(__file__).parents[1] / "vectors" / "ledger_v1.sqlite.gz").read_bytes())
    for name in ("data", "copy"):
        machine.journal(name).parent.mkdir(mode=0o700)
        machine.journal(name).touch(mode=0o600)
        machine.journal(name).write_bytes(released)
    machine.live()
    machine.refused()


def test_an_unreadable_fence_stops_the_start(machine: Machine) -> None:
    machine.live()
    machine.fence.write_bytes(b"nonsense")
    assert "cannot be read" in machine.refused("data").message


def test_a_fence_that_others_may_touch_is_refused(machine: Machine) -> None:
    machine.live()
    machine.fence.chmod(0o644)
    with pytest.raises(errors.LedgerUnsafe):
        machine.open()
    machine.fence.chmod(0o600)
    machine.fence.parent.chmod(0o755)
    with pytest.raises(errors.LedgerUnsafe):
        machine.open()


def test_a_fence_that_cannot_be_kept_stops_the_start(machine: Machine) -> None:
    machine.fence.parent.parent.write_text("a file where the folder should be")
    with pytest.raises(errors.LedgerFailed, match="cannot be kept"):
        machine.open()


def test_a_refused_journal_gives_back_both_locks_and_changes_nothing(machine: Machine) -> None:
    machine.live()
    machine.copy()
    machine.live()
    mark = machine.fence.read_bytes()
    for _ in range(2):
        machine.refused()
    assert machine.fence.read_bytes() == mark
    machine.live()


# A mark that cannot be moved


def test_when_the_mark_cannot_be_moved_nobody_is_told_of_success(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = machine.open()
    write(ledger, 1)

    def broken(self: Fence, mark: Mark) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Fence, "_write", broken)
    for _ in range(2):
        with pytest.raises(errors.LedgerFailed, match="Input/output error"):
            write(ledger, 1)
    assert ledger.head.seq == 1
    ledger.close()
    monkeypatch.undo()
    with machine.open() as again:
        assert again.head.seq == 2  # unknown until now, and harmless: nothing was said after it


# Adoption


def test_an_old_copy_can_be_adopted_and_then_the_other_one_is_the_copy(machine: Machine) -> None:
    machine.live()
    machine.copy()
    machine.live()
    with machine.open("copy", adopt=True) as ledger:
        assert ledger.epoch == 3
        (record,) = [record for record in ledger.records() if record.kind == ADOPTED]
        assert record.seq == 4
    machine.live("copy")
    machine.refused("data")


def test_a_new_journal_and_an_unreadable_fence_can_be_adopted(machine: Machine) -> None:
    machine.live()
    shutil.rmtree(machine.folder / "data")
    with machine.open(adopt=True) as ledger:
        assert [record.kind for record in ledger.records()] == [ADOPTED]
    machine.fence.write_bytes(b"nonsense")
    with machine.open(adopt=True) as ledger:
        assert [record.kind for record in ledger.records()] == [ADOPTED] * 2
    machine.live()


def test_the_right_journal_has_nothing_to_adopt(machine: Machine) -> None:
    machine.live()
    with machine.open(adopt=True) as ledger:
        assert [record.kind for record in ledger.records()] == ["t"] * 3


# Planted bugs: without this part of the mark the copy gets in


def _passes(check: Callable[[Mark, int | None, bytes | None], bool]) -> Callable[..., bool]:
    def passes(self: Fence, connection: object, head: object, genesis: bytes) -> bool:
        if self.mark is None:
            return True
        execute = connection.execute  # type: ignore[attr-defined]
        token = execute("SELECT token FROM epochs WHERE epoch = ?", (self.mark.epoch,)).fetchone()
        record = execute("SELECT hash FROM records WHERE seq = ?", (self.mark.seq,)).fetchone()
        return check(self.mark, token and token[0], record[0] if record else genesis if self.mark.seq == 0 else None)

    return passes


def test_planted_only_records_are_compared(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fence, "passes", _passes(lambda mark, token, record: record == mark.hash))
    with pytest.raises(pytest.fail.Exception):
        test_a_copy_is_refused_although_both_have_the_same_records(machine)


def test_planted_epochs_are_compared_without_their_token(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fence, "passes", _passes(lambda mark, token, record: token is not None))
    with pytest.raises(pytest.fail.Exception):
        test_a_copy_that_has_signed_as_much_is_refused(machine)


def test_planted_only_epochs_are_compared(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fence, "passes", _passes(lambda mark, token, record: token == mark.token))
    with pytest.raises(pytest.fail.Exception):
        test_a_backup_from_within_the_last_life_is_refused_after_a_kill(machine)


def test_planted_the_mark_stands_still_between_begin_and_close(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fence, "advance", lambda self, head: None)
    with pytest.raises(pytest.fail.Exception):
        test_a_backup_from_within_the_last_life_is_refused_after_a_kill(machine)


def test_planted_no_lock(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    from node.store import database

    acquire = database.FileLock.acquire
    monkeypatch.setattr(
        database.FileLock,
        "acquire",
        lambda path: acquire(path.with_name(f"{os.urandom(4).hex()}") if path.suffix == ".json" else path),
    )
    with pytest.raises((pytest.fail.Exception, errors.LedgerFenced)):
        test_a_copy_is_refused_while_the_original_runs(machine)
