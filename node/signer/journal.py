"""Hold a node's journal and its signer's table against each other, once per start, before anything is signed.

The rules are `protocol.signing_history`'s; here is what they need of the journal: which table it was begun with (a record of its
own, so that a lost table is noticed), whether it still holds the record that the table has seen, what it knows of each channel,
and which words about jobs and which transactions left.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from node.chain.pending import PendingTx
from node.errors import SignerOutdated
from node.signer.keys import Follow, Signers
from node.store.channels import ChannelBook
from node.store.ledger import ADOPTED, Entry, Ledger
from node.store.signed import SIGNED, read_word
from protocol.ids import ChannelId
from protocol.signing import Mark, MarkKey, transaction_mark
from protocol.signing_history import Ahead, KnownChannel, KnownWord

BEGUN: Final = "signer_begun"
"""Journal record: from here on this table is the memory of this journal's keys. Body {table: 16 bytes; empty: make a new one}."""

_OLD_JOURNAL: Final = (
    "start from the newest copy of the data dir; with an older one, the chain and the peers know more than you do"
)
_OLD_TABLE: Final = (
    "restore the signer's table that belongs to this journal; if it is lost and this journal is the newest copy: "
    "gristmill journal forget-signer --role ..."
)


class _FollowLedger(Follow):
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def head(self) -> Mark:
        return Mark(*self._ledger.head)


async def attach(signers: Signers, ledger: Ledger, channels: Iterable[KnownChannel]) -> dict[ChannelId, Ahead]:
    """From here on the signer may make marks. Returns the channels on which it has signed more than the journal knows: what it
    signed there never left before a crash, and the next one must be above.

    Raises `SignerOutdated` when one of the two is an old copy, `SignerFailed`, `LedgerError`.
    """
    begun, lost, since = _begun_with(ledger)
    adopting = not begun and signers.empty
    if begun and begun != signers.table:
        raise SignerOutdated(
            f"the journal {ledger.path} was kept with another signer's table than the one that is here", hint=_OLD_TABLE
        )
    if not lost:
        _check_witness(ledger, signers.witness)
    try:
        ahead = await signers.meet(
            channels,
            Mark(*ledger.head),
            adopting=adopting,
            lost=lost,
            words=known_words(ledger, 0 if adopting else since),
            following=_FollowLedger(ledger),
        )
    except SignerOutdated as error:
        raise SignerOutdated(error.message, hint=error.hint or _OLD_TABLE) from error
    if begun != signers.table:
        await ledger.append([Entry(BEGUN, b"", {"table": signers.table})])
    return {one.channel_id: one for one in ahead}


def forget(ledger: Ledger, table: Path) -> Path | None:
    """From the next start on another table is the memory of this journal's keys, begun from it. What is left of the old one is
    put aside; returns where."""
    ledger.append_sync([Entry(BEGUN, b"", {"table": b""})])
    if not table.exists():
        return None
    kept = next(path for n in itertools.count(1) if not (path := table.with_name(f"{table.name}.old{n}")).exists())
    for end in ("-wal", "-shm"):
        left = table.with_name(table.name + end)
        if left.exists():
            left.rename(kept.with_name(kept.name + end))
    table.rename(kept)
    return kept


def known_channels(book: ChannelBook) -> list[KnownChannel]:
    """What a journal says of each channel on which something may still be signed."""
    return [
        KnownChannel(
            channel_id=state.channel_id,
            token=state.config.token,
            domain=state.domain,
            authorized=state.authorized,
            valid_before=state.valid_before,
            cumulative=state.cumulative,
            signed=book.receipted.get(state.channel_id, 0),
            given=state.sequence,
            final=state.final,
        )
        for state in book.channels.values()
        if not state.closed and state.domain is not None
    ]


def known_words(ledger: Ledger, after: int = 0) -> list[KnownWord]:
    """The words about batch jobs that may have left, and the transactions, in records over `after`."""
    found: dict[MarkKey, KnownWord] = {}
    for kind, subject, body in _select(
        ledger,
        "SELECT kind, subject, body FROM records WHERE seq > ? AND kind IN (?, 'tx_signed') ORDER BY seq",
        (after, SIGNED),
    ):
        if kind == SIGNED:
            word = read_word(subject, body)
        else:
            word = KnownWord(*transaction_mark(PendingTx.from_body(msgspec.msgpack.decode(body)).signed.transaction))
        before = found.get(word.key)
        if before is None or before.mark.value < word.mark.value:  # a replacement that costs more
            found[word.key] = word
    return list(found.values())


def _begun_with(ledger: Ledger) -> tuple[bytes, bool, int]:
    """The table that the journal was kept with, empty when there is none to be missed; whether the journal is an old copy
    that goes on by its owner's will (`gristmill journal adopt`): then any table will do, because its channels are frozen; and
    the record since which it is so, 0 without a table."""
    rows = _select(
        ledger, "SELECT seq, kind, body FROM records WHERE kind IN (?, ?) ORDER BY seq DESC LIMIT 1", (BEGUN, ADOPTED)
    )
    if not rows:
        return b"", False, 0
    seq, kind, body = rows[0]
    table = b"" if kind == ADOPTED else msgspec.msgpack.decode(body)["table"]
    return table, kind == ADOPTED, seq if table else 0


def _check_witness(ledger: Ledger, witness: Mark | None) -> None:
    """Raises `SignerOutdated` when the journal lacks a record that it had when something was signed."""
    if witness is None or not witness.value:
        return
    rows = _select(ledger, "SELECT hash FROM records WHERE seq = ?", (witness.value,))
    if not rows:
        raise SignerOutdated(
            f"the journal {ledger.path} ends at record {ledger.head.seq}; when the signer last signed it had "
            f"{witness.value}: it is an old copy",
            hint=_OLD_JOURNAL,
        )
    if rows[0][0] != witness.digest:
        raise SignerOutdated(
            f"record {witness.value} of the journal {ledger.path} is not the one that the signer saw: "
            "it is another copy, which went on by itself",
            hint=_OLD_JOURNAL,
        )


def _select(ledger: Ledger, query: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
    with ledger.reading() as connection:
        found: list[tuple[Any, ...]] = connection.execute(query, tuple(values)).fetchall()
    return found
