"""A damaged journal is refused, or the damage is where it changes nothing: never a different fold.

Two states of the same journal are damaged: closed cleanly (one file), and as a crash leaves it (most records in the
write-ahead log). In the second one the last transaction may be lost: it looks like a power cut before the commit.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from node.store import errors, wal
from node.store.ledger import Entry, Ledger, Record

TAG = b"\x11" * 20
BATCHES = 60


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Record]]]:
    folder = tmp_path_factory.mktemp("images")
    rng = random.Random(7)
    path = folder / "clean" / "journal.sqlite"
    with Ledger.open(path, chain_tag=TAG) as ledger:
        for _ in range(BATCHES):
            entry = Entry(
                "test.made", rng.randbytes(32), {"n": rng.getrandbits(60), "b": rng.randbytes(rng.randrange(300))}
            )
            ledger.append_sync([entry, entry])
        records = list(ledger.records())
        crashed = folder / "crashed"
        crashed.mkdir(mode=0o700)
        for name in ("journal.sqlite", "journal.sqlite-wal"):  # nothing is being written: this is what a kill leaves
            shutil.copy(path.with_name(name), crashed / name)
    assert (crashed / "journal.sqlite-wal").stat().st_size > 100_000
    return {"clean": (path, records), "crashed": (crashed / "journal.sqlite", records)}


def damaged(image: Path, folder: Path, name: str, harm: Callable[[bytearray], object]) -> Path:
    """A copy of the image in which one file was harmed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    for suffix in ("", "-wal"):
        if (source := image.with_name(image.name + suffix)).exists():
            shutil.copy(source, folder / source.name)
    victim = folder / name
    data = bytearray(victim.read_bytes())
    harm(data)
    victim.write_bytes(data)
    return folder / image.name


def verdict(path: Path, records: list[Record], may_lose: int) -> str:
    """ "refused", or how the fold compares; a wrong fold fails here."""
    try:
        with Ledger.open(path, chain_tag=TAG, create=False) as ledger:
            found = list(ledger.records())
    except (errors.LedgerDamaged, errors.LedgerTooNew, errors.LedgerForeign):
        return "refused"
    assert found == records[: len(found)]
    assert len(found) >= len(records) - may_lose
    return "same" if len(found) == len(records) else "last transaction lost"


def test_the_undamaged_images_open(images: dict[str, tuple[Path, list[Record]]], tmp_path: Path) -> None:
    for state, (image, records) in images.items():
        path = damaged(image, tmp_path / state, image.name, lambda data: None)
        assert verdict(path, records, 0) == "same"


def begun_again(log: bytes, length: int) -> bytes:
    """The header with which SQLite begins this log again, so many bytes of it, over what is there."""
    magic, version, page, sequence, salt = struct.unpack_from(">5I", log)
    header = struct.pack(">6I", magic, version, page, sequence + 1, (salt + 1) & 0xFFFFFFFF, 0x5EED_5A17)
    header += struct.pack(">2I", *wal._checksum(">" if magic & 1 else "<", header, 0, 0))
    return header[:length] + log[length:]


@pytest.mark.parametrize("length", [12, 15, 16, 17, 20, 23, 24, 28, 31])
@pytest.mark.parametrize("copied", [True, False])
def test_a_header_that_a_full_disk_left_half_written(
    images: dict[str, tuple[Path, list[Record]]], tmp_path: Path, length: int, copied: bool
) -> None:
    """A log is begun again when all of it is in the file. With a log that is not, the same header would lose it: refused."""
    image, records = images["crashed"]
    path = damaged(image, tmp_path / "copy", image.name, lambda data: None)
    log = wal.path_of(path)
    if copied:
        before = log.read_bytes()
        with closing(sqlite3.connect(path)) as connection:  # which takes the log away at its end
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        log.write_bytes(before)
    log.write_bytes(begun_again(log.read_bytes(), length))
    whole = length < 16  # as it was: the number's low byte is the first that differs
    assert verdict(path, records, 0) == ("same" if copied or whole else "refused")


def test_a_log_with_one_page_that_is_not_in_the_file_is_not_given_up(
    images: dict[str, tuple[Path, list[Record]]], tmp_path: Path
) -> None:
    """Whatever is wrong besides, a half-written header excuses nothing: a page that differs, a frame that does not hold."""
    image, records = images["crashed"]
    for harm in ("file", "frame", "first frame", "magic"):
        path = damaged(image, tmp_path / "copy", image.name, lambda data: None)
        log = wal.path_of(path)
        before = bytearray(log.read_bytes())
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        torn = bytearray(begun_again(bytes(before), 16))
        if harm == "file":
            data = bytearray(path.read_bytes())
            data[-100] ^= 1
            path.write_bytes(data)
        elif harm != "magic":
            torn[32 + 24 + 4096 + 100 if harm == "frame" else 32 + 9] ^= 1
        else:
            torn[0] ^= 1
        log.write_bytes(torn)
        assert verdict(path, records, 0) == "refused", harm


@pytest.mark.parametrize(
    ("state", "name", "may_lose", "least_refused"),
    [
        ("clean", "journal.sqlite", 0, 20),
        ("crashed", "journal.sqlite", 0, 0),  # every page of it is in the log once more
        ("crashed", "journal.sqlite-wal", 2, 50),
    ],
)
def test_flipped_bits(
    images: dict[str, tuple[Path, list[Record]]],
    tmp_path: Path,
    state: str,
    name: str,
    may_lose: int,
    least_refused: int,
) -> None:
    """J2."""
    image, records = images[state]
    size = image.with_name(name).stat().st_size
    rng = random.Random(3)
    verdicts: Counter[str] = Counter()
    for offset in [*range(0, 100, 7), *(rng.randrange(size) for _ in range(60))]:
        if offset >= size:
            continue

        def flip(data: bytearray, offset: int = offset) -> None:
            data[offset] ^= 1 << rng.randrange(8)

        path = damaged(image, tmp_path / "copy", name, flip)
        verdicts[verdict(path, records, may_lose)] += 1
    assert verdicts["refused"] >= least_refused, verdicts


@pytest.mark.parametrize(
    ("state", "name"), [("clean", "journal.sqlite"), ("crashed", "journal.sqlite"), ("crashed", "journal.sqlite-wal")]
)
def test_truncation(images: dict[str, tuple[Path, list[Record]]], tmp_path: Path, state: str, name: str) -> None:
    """A file that got shorter is refused. A log that got shorter is a shorter past: indistinguishable from an old copy."""
    image, records = images[state]
    size = image.with_name(name).stat().st_size
    rng = random.Random(4)
    for length in [0, 1, 100, 511, 512, 4096, size - 1, *(rng.randrange(size) for _ in range(20))]:

        def cut(data: bytearray, length: int = length) -> None:
            del data[length:]

        path = damaged(image, tmp_path / "copy", name, cut)
        found = verdict(path, records, may_lose=len(records))
        if name == "journal.sqlite" and state == "clean":
            assert found == "refused", length


def test_damage_beside_the_records_is_refused_too(images: dict[str, tuple[Path, list[Record]]], tmp_path: Path) -> None:
    """The kept results are not chained; SQLite's own check of the pages covers their tables."""
    image, records = images["clean"]
    with sqlite3.connect(image) as connection:
        pages = [row[0] for row in connection.execute("SELECT rootpage FROM sqlite_master WHERE tbl_name = 'results'")]
    connection.close()
    assert len(pages) == 3
    for page in pages:

        def harm(data: bytearray, page: int = page) -> None:
            data[(page - 1) * 4096 : page * 4096] = bytes(4096)

        assert verdict(damaged(image, tmp_path / "copy", image.name, harm), records, 0) == "refused"


def test_a_flip_anywhere_in_a_record_is_found_and_named(tmp_path: Path) -> None:
    """J2: past all of SQLite's own checks: the rows are changed through SQLite itself."""
    for column, value in [
        ("at_ms", "at_ms + 1"),
        ("kind", "'test.mode'"),
        ("kind", "CAST(kind AS BLOB)"),
        ("subject", "x'00'"),
        ("subject", "CAST(subject AS TEXT)"),
        ("body", "x'80'"),
        ("hash", "zeroblob(32)"),
        ("at_ms", "-1"),
        ("at_ms", "'soon'"),
    ]:
        path = tmp_path / "data" / "journal.sqlite"
        shutil.rmtree(path.parent, ignore_errors=True)
        with Ledger.open(path, chain_tag=TAG) as ledger:
            ledger.append_sync([Entry("test.made", bytes([65 + n]), {"n": n}) for n in range(9)])
        edit(path, f"UPDATE records SET {column} = {value} WHERE seq = 5")
        for read_only in (False, True):
            with pytest.raises(errors.LedgerDamaged) as caught:
                Ledger.open(path, chain_tag=TAG, read_only=read_only)
            assert caught.value.seq == 5, column


@pytest.mark.parametrize(
    ("harm", "seq"),
    [
        ("DELETE FROM records WHERE seq = 5", 5),
        ("DELETE FROM records WHERE seq = 1", 1),
        ("DELETE FROM records WHERE seq = 9", 9),
        ("DELETE FROM records", 1),
        ("DELETE FROM head", 10),
        ("UPDATE head SET seq = 8", 10),
        ("UPDATE records SET seq = 10 WHERE seq = 9", 9),
        ("UPDATE about SET schema = 0", 0),
        ("DELETE FROM about", 0),
        ("UPDATE about SET chain_tag = 'text'", 0),
        ("DROP TABLE head", 0),
        ("PRAGMA user_version = 0", 0),
        ("PRAGMA application_id = 1", 0),
    ],
)
def test_missing_and_inconsistent_rows(tmp_path: Path, harm: str, seq: int) -> None:
    """J2."""
    path = tmp_path / "data" / "journal.sqlite"
    with Ledger.open(path, chain_tag=TAG) as ledger:
        ledger.append_sync([Entry("test.made", b"", {"n": n}) for n in range(9)])
    edit(path, harm)
    with pytest.raises(errors.LedgerDamaged) as caught:
        Ledger.open(path, chain_tag=TAG)
    assert caught.value.seq == seq


def edit(path: Path, sql: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    for trigger in ("records_never_change", "records_never_go"):
        connection.execute(f"DROP TRIGGER {trigger}")
    connection.execute(sql)
    connection.close()


def test_a_log_without_its_journal_is_not_a_new_journal(
    images: dict[str, tuple[Path, list[Record]]], tmp_path: Path
) -> None:
    path = damaged(images["crashed"][0], tmp_path / "copy", "journal.sqlite", lambda data: None)
    path.unlink()
    with pytest.raises(errors.LedgerDamaged, match="is gone"):
        Ledger.open(path, chain_tag=TAG)


def test_something_else_is_not_a_journal(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    other = tmp_path / "other.sqlite"
    sqlite3.connect(other).execute("CREATE TABLE t (x)").connection.close()
    noise = tmp_path / "noise"
    noise.write_bytes(random.Random(1).randbytes(10_000))
    for path in (other, noise):
        path.chmod(0o600)
        before = path.read_bytes()
        with pytest.raises(errors.LedgerDamaged):
            Ledger.open(path, chain_tag=TAG)
        if path is noise:
            assert path.read_bytes() == before


def test_a_start_that_died_while_making_the_file_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    (folder / "journal.sqlite.new").write_bytes(b"half a file")
    with Ledger.open(folder / "journal.sqlite", chain_tag=TAG) as ledger:
        assert ledger.head.seq == 0
    assert sorted(path.name for path in folder.iterdir()) == ["journal.sqlite", "journal.sqlite.lock"]
