"""Invariant K10, the pure half: a journal and marks that do not belong together are told apart, and by which channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from node.testing.pair import key
from protocol.ids import ZERO_HASH, Address, ChannelId, Hash32, JobId
from protocol.signing import KeyRole, Mark, MarkKey, Policy, Rulebook, Scope
from protocol.signing_history import (
    Ahead,
    JournalOutdated,
    KnownChannel,
    KnownWord,
    MarksOutdated,
    adopt,
    adopt_words,
    compare,
    word_of,
)
from protocol.transactions import Transaction
from protocol.typed_data import Acceptance, Close, Domain, Submission, Voucher

DOMAIN = Domain(31337, Address(b"\x01" * 20))
TOKEN = Address(b"\x05" * 20)
CHANNEL = ChannelId(b"\x07" * 32)
CLIENT = KnownChannel(CHANNEL, TOKEN, DOMAIN, authorized=1000, valid_before=9, cumulative=40)
WORKER = KnownChannel(CHANNEL, TOKEN, DOMAIN, signed=4, given=6)


def marks_of(known: KnownChannel, *, worker: bool) -> dict[MarkKey, Mark]:
    return dict(adopt(known, worker=worker))


@pytest.mark.parametrize(("known", "worker"), [(CLIENT, False), (WORKER, True), (replace(WORKER, final=17), True)])
def test_what_was_adopted_fits(known: KnownChannel, worker: bool) -> None:
    marks = marks_of(known, worker=worker)
    assert compare([known], marks, worker=worker) == ((), [])


def test_adopted_vouchers_go_on_and_the_last_may_be_signed_again() -> None:
    from protocol.signing import DomainRule, SigningRefused, TokenRule, request
    from protocol.signing_policy import check

    policy = Policy(
        domains=(DomainRule("Voucher", 31337, bytes(DOMAIN.verifying_contract)),),
        tokens=(TokenRule(31337, bytes(TOKEN)),),
    )
    book = Rulebook(policy, {KeyRole.SESSION: key("session").address})
    marks = marks_of(CLIENT, worker=False)
    assert check(book, marks, request(KeyRole.SESSION, Voucher(CHANNEL, 40), DOMAIN), 0) == ()
    assert check(book, marks, request(KeyRole.SESSION, Voucher(CHANNEL, 41), DOMAIN), 0)
    for total in (39, 1001):
        with pytest.raises(SigningRefused):
            check(book, marks, request(KeyRole.SESSION, Voucher(CHANNEL, total), DOMAIN), 0)


@pytest.mark.parametrize(
    ("known", "worker", "word"),
    [
        (replace(CLIENT, cumulative=41), False, "voucher 41"),
        (replace(CLIENT, authorized=1001), False, "allocation 1001"),
        (replace(WORKER, signed=7, given=7), True, "receipt 7"),
    ],
)
def test_marks_that_are_older_than_the_journal_are_refused(known: KnownChannel, worker: bool, word: str) -> None:
    marks = marks_of(WORKER if worker else CLIENT, worker=worker)
    with pytest.raises(MarksOutdated, match=f"{word}.*{CHANNEL}|{CHANNEL}.*{word}"):
        compare([known], marks, worker=worker)


def test_marks_that_were_never_made_are_older_too() -> None:
    with pytest.raises(MarksOutdated):
        compare([CLIENT], {}, worker=False)
    with pytest.raises(MarksOutdated):
        compare([WORKER], {}, worker=True)


@pytest.mark.parametrize(
    "marks",
    [
        {(Scope.RECEIPTS, bytes(CHANNEL)): Mark(7)},
        {(Scope.RECEIPTS, bytes(CHANNEL)): Mark(6), (Scope.CLOSE, bytes(CHANNEL)): Mark(17)},
    ],
)
def test_a_journal_that_is_older_than_the_marks_is_refused(marks: Mapping[MarkKey, Mark]) -> None:
    with pytest.raises(JournalOutdated, match=str(CHANNEL)):
        compare([WORKER], marks, worker=True)


def test_a_receipt_that_a_crash_kept_from_the_journal_is_no_old_journal() -> None:
    """Number 6 was given, its receipt signed, the journal never heard: the part is closed without one, and 6 is burnt."""
    marks = {(Scope.RECEIPTS, bytes(CHANNEL)): Mark(6)}
    assert compare([WORKER], marks, worker=True) == ((), [])


def test_a_close_that_is_journaled_and_not_signed_yet_becomes_a_mark() -> None:
    marks = marks_of(WORKER, worker=True)
    added, _ = compare([replace(WORKER, final=17)], marks, worker=True)
    assert added == (((Scope.CLOSE, CHANNEL), Mark(17, Close(CHANNEL, 17).digest(DOMAIN))),)


@pytest.mark.parametrize(
    ("voucher", "allocation", "ahead"),
    [(55, 1000, Ahead(CHANNEL, 55, 0)), (40, 2000, Ahead(CHANNEL, 0, 2000)), (55, 2000, Ahead(CHANNEL, 55, 2000))],
)
def test_the_caller_hears_what_a_crash_kept_from_its_journal(voucher: int, allocation: int, ahead: Ahead) -> None:
    marks = marks_of(CLIENT, worker=False)
    marks[Scope.VOUCHER, CHANNEL] = Mark(voucher)
    marks[Scope.CHANNEL, CHANNEL] = Mark(allocation)
    assert compare([CLIENT], marks, worker=False) == ((), [ahead])


JOB = JobId(b"\x0b" * 32)
TX = Transaction(31337, 5, 1, 100, 21_000, TOKEN, 0, b"")
WORDS = [word_of(Acceptance(JOB, Hash32(b"\x01" * 32), 70), DOMAIN), word_of(Submission(JOB, ZERO_HASH, 9), DOMAIN)]


@pytest.mark.parametrize("word", [*WORDS, word_of(TX, None)])
def test_a_word_that_left_has_its_mark(word: KnownWord) -> None:
    marks = dict(adopt_words([word]))
    assert compare([], marks, worker=True, words=[word]) == ((), [])
    with pytest.raises(MarksOutdated, match=str(word)):
        compare([], {}, worker=True, words=[word])


def test_marks_of_another_acceptance_are_those_of_another_history() -> None:
    """Two copies that went on by themselves: the journal's acceptance left, and the table knows of another one."""
    marks = dict(adopt_words([word_of(Acceptance(JOB, Hash32(b"\x02" * 32), 70), DOMAIN)]))
    with pytest.raises(MarksOutdated, match=f"acceptance of job {JOB}"):
        compare([], marks, worker=False, words=WORDS[:1])


@pytest.mark.parametrize(("fee", "outdated"), [(99, True), (100, False), (101, False)])
def test_a_transaction_may_have_been_replaced_by_a_dearer_one(fee: int, outdated: bool) -> None:
    marks = dict(adopt_words([word_of(replace(TX, max_fee=fee), None)]))
    if not outdated:
        assert compare([], marks, worker=False, words=[word_of(TX, None)]) == ((), [])
        return
    with pytest.raises(MarksOutdated, match="transaction 5 on chain 31337"):
        compare([], marks, worker=False, words=[word_of(TX, None)])


def test_what_leaves_no_mark_is_no_word() -> None:
    assert word_of(Voucher(CHANNEL, 1), DOMAIN) is None and word_of(Acceptance(JOB, ZERO_HASH, 1), None) is None


def test_a_long_list_is_cut_short() -> None:
    many = [replace(CLIENT, channel_id=ChannelId(bytes([n]) * 32)) for n in range(9)]
    with pytest.raises(MarksOutdated, match="and 6 more"):
        compare(many, {}, worker=False)
