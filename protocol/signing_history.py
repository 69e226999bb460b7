"""The journal and the signer's marks hold each other to account at a start.

The journal is written by whoever asks for signatures, the marks by the signer, each durable before anybody outside hears of it.
So each is a witness against an old copy of the other:

- Marks come first: what the journal knows as signed has its mark. A journal that knows more says that the marks are old.
- Orders, acceptances and submissions of batch jobs are journaled as signed before they leave, transactions before they are sent.
  Each has its mark, or the marks are old: and with them the day's sums, of which the journal knows nothing.
- Each request names the last record of the journal, and the signer keeps the highest. A journal that does not hold that very
  record is an old copy, or another one.
- A receipt is asked for only under a number that is journaled. Marks above it say, for that channel, that the journal is old.
- After a crash a voucher or an allocation may have its mark and not its record: it never left. The caller is told (`Ahead`) and
  goes on above it.

Both copied back together look like the past; that only peers, the chain and `node.store.fence` can tell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from protocol.errors import LocalProtocolError
from protocol.ids import Address, ChannelId
from protocol.signing import Changes, Mark, MarkKey, Marks, QuotedOrder, Scope, Signable, transaction_mark
from protocol.transactions import Transaction
from protocol.typed_data import Acceptance, Allocation, Close, Domain, Submission, Voucher


class MarksOutdated(LocalProtocolError):
    """The marks are older than the journal."""


class JournalOutdated(LocalProtocolError):
    """The journal is older than the marks."""


@dataclass(frozen=True, slots=True)
class KnownChannel:
    """What the journal says was signed on one channel."""

    channel_id: ChannelId
    token: Address
    domain: Domain
    authorized: int = 0
    """Client: highest allocation; `valid_before` is its own."""
    valid_before: int = 0
    cumulative: int = 0
    """Client: highest voucher."""
    signed: int = 0
    """Worker: highest number of a receipt in the journal."""
    given: int = 0
    """Worker: highest number that was given to a part, so that a receipt may be asked for."""
    final: int | None = None
    """Worker: the total of a close."""


@dataclass(frozen=True, slots=True)
class KnownWord:
    """What the journal says was signed under a name of its own: a word about a batch job, or a transaction."""

    key: MarkKey
    mark: Mark
    """As the signer has made it, or will have; a transaction may have been replaced by a dearer one since."""

    def __str__(self) -> str:
        scope, subject = self.key
        if scope is Scope.TRANSACTION:
            return f"transaction {int.from_bytes(subject[8:])} on chain {int.from_bytes(subject[:8])}"
        return f"{scope.name.lower()} of job 0x{subject.hex()}"


def word_of(struct: Signable, domain: Domain | None) -> KnownWord | None:
    """What a journal has to know of a signature before it leaves; None for what it knows anyway or need not."""
    if isinstance(struct, Transaction):
        return KnownWord(*transaction_mark(struct))
    if domain is None:
        return None
    match struct:
        case QuotedOrder():
            return KnownWord((Scope.ORDER, struct.order.job_id), Mark(struct.quote.amount, struct.digest(domain)))
        case Acceptance():
            return KnownWord((Scope.ACCEPTANCE, struct.job_id), Mark(struct.amount, struct.digest(domain)))
        case Submission():
            return KnownWord((Scope.SUBMISSION, struct.job_id), Mark(struct.claimed, struct.digest(domain)))
    return None


@dataclass(frozen=True, slots=True)
class Ahead:
    """A mark above what the journal knows."""

    channel_id: ChannelId
    voucher: int
    allocation: int
    """0 where the journal is level."""


def adopt(channel: KnownChannel, *, worker: bool) -> Changes:
    """Marks for a channel that was there before the marks: as if all that the journal knows had been signed here."""
    key, domain = channel.channel_id, channel.domain
    if worker:
        new: Changes = (
            ((Scope.RECEIPTS, key), Mark(channel.given)),
            ((Scope.RECEIPT_FLOOR, key), Mark(channel.given)),
        )
        return new + _closed(channel)
    allocation = Allocation(key, channel.authorized, channel.valid_before)
    voucher = Voucher(key, channel.cumulative)
    return (
        ((Scope.CHANNEL, key), Mark(channel.authorized, allocation.digest(domain))),
        ((Scope.TOKEN, key), Mark(domain.chain_id, bytes(channel.token))),
        ((Scope.VOUCHER, key), Mark(channel.cumulative, voucher.digest(domain))),
    )


def adopt_words(words: Iterable[KnownWord]) -> Changes:
    """Marks for words that were there before the marks."""
    return tuple((word.key, word.mark) for word in words)


def compare(
    channels: Iterable[KnownChannel],
    marks: Marks,
    *,
    worker: bool,
    lost: bool = False,
    words: Iterable[KnownWord] = (),
) -> tuple[Changes, list[Ahead]]:
    """What to add to the marks, and where they are ahead of the journal.

    `lost`: the journal is known to be an old copy, and its owner goes on with it. The marks then stand above it, which is what
    keeps a number from being signed twice.

    Raises `MarksOutdated` or `JournalOutdated`, naming the channels, jobs and transactions.
    """
    added: list[tuple[MarkKey, Mark]] = []
    ahead, old_marks, old_journal = [], [], []
    for channel in channels:
        key = channel.channel_id
        if worker:
            receipts, close = _value(marks, Scope.RECEIPTS, key), marks.get((Scope.CLOSE, key))
            if receipts < channel.signed:
                old_marks.append(f"receipt {channel.signed} of channel {key}, marks up to {receipts}")
            if receipts > channel.given:
                old_journal.append(f"receipt {receipts} of channel {key}, journal up to {channel.given}")
            if close is None:
                added += _closed(channel)
            elif channel.final != close.value:
                old_journal.append(f"close of channel {key} at {close.value}, journal: {channel.final}")
            continue
        vouchers, allocated = _value(marks, Scope.VOUCHER, key), _value(marks, Scope.CHANNEL, key)
        if vouchers < channel.cumulative or allocated < channel.authorized:
            old_marks.append(
                f"channel {key}: voucher {channel.cumulative} and allocation {channel.authorized}, "
                f"marks {vouchers} and {allocated}"
            )
        elif vouchers > channel.cumulative or allocated > channel.authorized:
            ahead.append(
                Ahead(
                    key,
                    vouchers if vouchers > channel.cumulative else 0,
                    allocated if allocated > channel.authorized else 0,
                )
            )
    old_marks += [f"{word}, no mark of it" for word in words if not _has(marks, word)]
    if old_marks:
        raise MarksOutdated(_listed("the journal knows of more than the signer's marks", old_marks))
    if old_journal and not lost:
        raise JournalOutdated(_listed("the signer's marks know of more than the journal", old_journal))
    return tuple(added), ahead


def _has(marks: Marks, word: KnownWord) -> bool:
    """Of a job's words there is one, the very one. Of a transaction the last one signed for its nonce counts, and that may be
    one that a crash kept from the journal."""
    found = marks.get(word.key)
    if found is None:
        return False
    return found.value >= word.mark.value if word.key[0] is Scope.TRANSACTION else found == word.mark


def _closed(channel: KnownChannel) -> Changes:
    """A close is journaled before it is signed: its mark may be missing, and is set to what the journal decided."""
    if channel.final is None:
        return ()
    digest = Close(channel.channel_id, channel.final).digest(channel.domain)
    return (((Scope.CLOSE, channel.channel_id), Mark(channel.final, digest)),)


def _value(marks: Marks, scope: Scope, channel: ChannelId) -> int:
    found = marks.get((scope, channel))
    return found.value if found else 0


def _listed(what: str, found: list[str]) -> str:
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return f"{what}: {'; '.join(found[:3])}{more}"
