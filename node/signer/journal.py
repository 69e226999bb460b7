"""Hold a node's journal and its signer's table against each other, once per start, before anything is signed.

The rules are `protocol.signing_history`'s; here is what they need of the journal: which table it was begun with (a record of its
own, so that a lost table is noticed), whether it still holds the record that the table has seen, and what it knows of each
channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from node.errors import SignerOutdated
from node.signer.keys import Follow, Signers
from node.store.ledger import Entry, Ledger
from protocol.ids import ChannelId
from protocol.signing import Mark
from protocol.signing_history import Ahead, KnownChannel

BEGUN: Final = "signer_begun"
"""Journal record: from here on this table is the memory of this journal's keys. Body {table: 16 bytes; empty: make a new one}."""

_OLD_JOURNAL: Final = (
    "start from the newest copy of the data dir; with an older one, the chain and the peers know more than you do"
)
_OLD_TABLE: Final = (
    "restore the signer's table that belongs to this journal; if it is lost and this journal is the newest copy: "
    "gristmill journal forget-signer"
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
    begun = _begun_with(ledger)
    adopting = begun in (None, b"") and signers.empty
    if begun not in (None, b"", signers.table):
        raise SignerOutdated(
            f"the journal {ledger.path} was kept with another signer's table than the one that is here", hint=_OLD_TABLE
        )
    if begun is not None and begun and signers.empty:
        raise SignerOutdated("the signer's table is empty, and the journal was kept with it", hint=_OLD_TABLE)
    _check_witness(ledger, signers.witness)
    try:
        ahead = await signers.meet(channels, Mark(*ledger.head), adopting=adopting, following=_FollowLedger(ledger))
    except SignerOutdated as error:
        raise SignerOutdated(error.message, hint=error.hint or _OLD_TABLE) from error
    if begun != signers.table:
        await ledger.append([Entry(BEGUN, b"", {"table": signers.table})])
    return {one.channel_id: one for one in ahead}


def _begun_with(ledger: Ledger) -> bytes | None:
    rows = _select(ledger, "SELECT body FROM records WHERE kind = ? ORDER BY seq DESC LIMIT 1", (BEGUN,))
    return msgspec.msgpack.decode(rows[0][0])["table"] if rows else None


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


def _select(ledger: Ledger, query: str, values: Sequence[object]) -> list[tuple[bytes]]:
    with ledger.reading() as connection:
        found: list[tuple[bytes]] = connection.execute(query, tuple(values)).fetchall()
    return found
