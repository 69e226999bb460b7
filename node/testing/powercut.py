"""A power cut, played from a record: what a disk may hold when the current fails at some moment of a process's life.

The process is the real one, on its own SQLite and its own Python; `powercut.c`, loaded into it with LD_PRELOAD, records what it
writes, truncates, renames and syncs below one folder. The record is then cut anywhere, as often as one likes, and each cut is
made into a folder. (An SQLite VFS would see SQLite's files only, and with `apsw` it would be another SQLite than the one that is
shipped; a journal also rests on renames and synced folders of ours.)

What a disk keeps, as harshly as the interface allows:
- of a file: everything before its last fsync or fdatasync; of each write and truncation after it all, nothing, or any subset of
  its sectors of 512 bytes, each write on its own, in no order. A sector that is not kept has its old content, or zeros where the
  file was shorter. Sectors are whole (as SQLite assumes of a disk: "powersafe overwrite").
- of a folder: everything before its last fsync, and after it a prefix of what was done to its names. (File systems with a journal
  keep names in order. Strictly nothing more is promised, so a synced file may be gone with its name.)
- of what a failed sync was for: nothing, also not by the next sync that succeeds.
- of files that are mapped into memory (`-shm`): anything at all.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SECTOR = 512
_HEAD = struct.Struct("<c3xiqii")
SOURCE = Path(__file__).with_suffix(".c")


def compiler() -> str | None:
    """The C compiler, or None: then there is no record."""
    return shutil.which("cc") or shutil.which("gcc")


def build(folder: Path) -> Path:
    """Compile the recorder into `folder`. Raises `subprocess.CalledProcessError`."""
    target = folder / "powercut.so"
    command = [compiler() or "cc", "-shared", "-fPIC", "-O1", "-o", str(target), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return target


def environment(library: Path, root: Path, trace: Path) -> dict[str, str]:
    """Variables under which a process is recorded."""
    return {"LD_PRELOAD": str(library), "POWERCUT_ROOT": str(root), "POWERCUT_TRACE": str(trace)}


class Event(NamedTuple):
    """One call, as the recorder wrote it: o(pen), c(lose), w(rite), t(runcate), s(ync), f(ailed sync), r(ename), u(nlink),
    m(kdir), a(cknowledged)."""

    op: str
    fd: int
    offset: int
    text: str
    data: bytes


def read(trace: Path) -> list[Event]:
    """The record, in order. A last entry that the end of the process cut short is left out."""
    raw, at, events = trace.read_bytes(), 0, []
    while at + _HEAD.size <= len(raw):
        op, fd, offset, text, data = _HEAD.unpack_from(raw, at)
        start = at + _HEAD.size
        at = start + text + data
        if at > len(raw):
            break
        events.append(Event(op.decode(), fd, offset, os.fsdecode(raw[start : start + text]), raw[start + text : at]))
    return events


@dataclass(eq=False)
class _File:
    synced: bytearray
    """What is on the disk for certain."""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Writes (offset, data) and truncations (length, None) since."""

    def content(self, rng: random.Random) -> bytes:
        """What a cut leaves."""
        held = bytearray(self.synced)
        mood = rng.choice(["all", "none", "mixed", "mixed"])
        for offset, data in self.pending:
            fate = mood if mood != "mixed" else rng.choice(["all", "none", "torn"])
            if fate == "all" or (fate == "torn" and data is None):
                _apply(held, offset, data)
            elif fate == "torn" and data is not None:
                _tear(held, offset, data, rng)
        return bytes(held)

    def sync(self) -> None:
        for offset, data in self.pending:
            _apply(self.synced, offset, data)
        self.pending.clear()

    def fail(self) -> None:
        """A sync failed: the kernel forgets what it could not write, and no later sync brings it back."""
        self.pending.clear()


def _apply(held: bytearray, offset: int, data: bytes | None) -> None:
    held.extend(bytes(max(0, offset - len(held))))
    if data is None:
        del held[offset:]
    else:
        held[offset : offset + len(data)] = data


def _tear(held: bytearray, offset: int, data: bytes, rng: random.Random) -> None:
    """Keep any of the sectors; and maybe the file's new length without its new content."""
    end = offset + len(data)
    for sector in range(offset - offset % SECTOR, end, SECTOR):
        if rng.random() < 0.5:
            low, high = max(sector, offset), min(sector + SECTOR, end)
            _apply(held, low, data[low - offset : high - offset])
    if rng.random() < 0.3:
        held.extend(bytes(max(0, end - len(held))))


_Names = dict[str, "_File | _Folder"]
_Change = tuple[str, "_File | _Folder | None"]


@dataclass(eq=False)
class _Folder:
    synced: _Names = field(default_factory=dict)
    pending: list[tuple[_Change, ...]] = field(default_factory=list)
    """Steps since: names that come or go together."""

    def names(self, kept: int | None = None) -> _Names:
        held = dict(self.synced)
        for step in self.pending[:kept]:
            for name, child in step:
                if child is None:
                    held.pop(name, None)
                else:
                    held[name] = child
        return held

    def sync(self) -> None:
        self.synced = self.names()
        self.pending.clear()

    def fail(self) -> None:
        """Nothing is promised; the names may still arrive."""


class Disk:
    """What a recorded process does to one folder, and what a cut would leave of it.

    Made before the process starts; then `take` its record, call by call.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._top = _load(root)
        self._open: dict[int, _File | _Folder] = {}
        self.said = b""
        """What was acknowledged on stdout so far."""

    def take(self, event: Event) -> None:
        """One more call has happened (of a write: has begun)."""
        match event.op:
            case "o":
                self._open[event.fd] = self._opened(event)
            case "c":
                self._open.pop(event.fd, None)
            case "w" if isinstance(file := self._open[event.fd], _File):
                file.pending.append((event.offset, event.data))
            case "t" if isinstance(file := self._open[event.fd], _File):
                file.pending.append((event.offset, None))
            case "s":
                self._open[event.fd].sync()
            case "f":
                self._open[event.fd].fail()
            case "r":
                source, name = self._place(event.text)
                target, new = self._place(os.fsdecode(event.data))
                if source is not target:
                    raise ValueError("renames across folders are not played")
                source.pending.append(((name, None), (new, source.names()[name])))
            case "u":
                folder, name = self._place(event.text)
                folder.pending.append(((name, None),))
            case "m":
                folder, name = self._place(event.text)
                folder.pending.append(((name, _Folder()),))
            case "a":
                self.said += event.data
            case other:
                raise ValueError(f"the record has an entry {other!r}")

    def cut(self, rng: random.Random, target: Path) -> None:
        """Make what the cut leaves into the folder `target`, which must not exist."""
        _save(self._top, target, rng)

    def _opened(self, event: Event) -> _File | _Folder:
        if event.text == str(self.root):
            return self._top
        folder, name = self._place(event.text)
        if event.data == b"new":
            folder.pending.append(((name, _File(bytearray())),))
        found = folder.names()[name]
        if event.offset and isinstance(found, _File):
            found.pending.append((0, None))
        return found

    def _place(self, path: str) -> tuple[_Folder, str]:
        *folders, name = Path(path).relative_to(self.root).parts
        here = self._top
        for one in folders:
            below = here.names()[one]
            if not isinstance(below, _Folder):
                raise ValueError(f"{path} leads through a file")
            here = below
        return here, name


def _load(path: Path) -> _Folder:
    names: _Names = {
        one.name: _load(one) if one.is_dir() else _File(bytearray(one.read_bytes())) for one in path.iterdir()
    }
    return _Folder(names)


def _save(folder: _Folder, target: Path, rng: random.Random) -> None:
    target.mkdir(mode=0o700)
    kept = rng.choice([0, len(folder.pending), rng.randint(0, len(folder.pending))])
    for name, child in folder.names(kept).items():
        path = target / name
        if isinstance(child, _Folder):
            _save(child, path, rng)
            continue
        content = child.content(rng)
        if name.endswith("-shm"):
            content = rng.choice([b"", bytes(len(content)), rng.randbytes(len(content)), content])
        path.touch(mode=0o600)
        path.write_bytes(content)
