"""Check, store, then sign: what a signer does with a batch of requests, in whichever process it runs.

The order is the promise: the policy judges each request against the marks, those before it in the batch included; the marks of
all that pass become durable in one commit; then, and only then, signatures are made. A batch shares one fsync.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from node.errors import SignerFailed, SignerOutdated
from node.signer.table import Table
from protocol.errors import LocalProtocolError
from protocol.identity import IdentityMessage
from protocol.keys import PrivateKey
from protocol.signing import KeyRole, Mark, MarkKey, Policy, Request, Rulebook, Scope, SigningRefused
from protocol.signing_history import Ahead, KnownChannel, KnownWord, adopt, adopt_words, compare
from protocol.signing_policy import check

JOURNAL: MarkKey = (Scope.JOURNAL, b"")
Answer = bytes | SigningRefused


class _Overlay:
    """The table with what is about to be stored on top."""

    def __init__(self, table: Table) -> None:
        self.new: dict[MarkKey, Mark] = {}
        self._table = table

    def get(self, key: MarkKey) -> Mark | None:
        found = self.new.get(key)
        return self._table.get(key) if found is None else found


class Core:
    """Keys, policy and table together."""

    def __init__(
        self, keys: Mapping[KeyRole, PrivateKey], policy: Policy, table: Table, clock: Callable[[], float]
    ) -> None:
        self.keys = dict(keys)
        self.table = table
        self.met = False
        """Whether a journal was held against the table. Until then nothing that leaves a mark is signed."""
        self._rulebook = Rulebook(policy, {role: key.address for role, key in keys.items()})
        self._clock = clock

    def handle(self, asked: Sequence[Request], witness: Mark | None = None) -> list[Answer]:
        """One answer per request, in order. `witness`: the last record of the caller's journal, number and hash.

        Raises `SignerFailed` when the marks cannot be stored, or could not be before: nothing is signed then, not even again
        what was signed already. After a failed commit a look at the table may show marks that no disk has.
        """
        if self.table.failure is not None:
            raise SignerFailed(self.table.failure)
        marks, now = _Overlay(self.table), int(self._clock())
        answers: list[Answer | None] = []
        for request in asked:
            try:
                changes = check(self._rulebook, marks, request, now)
            except SigningRefused as no:
                answers.append(no)
                continue
            marks.new.update(changes)
            answers.append(None)
        if marks.new:
            if not self.met:
                raise SignerFailed("asked to sign before a journal was held against the signer's table")
            if witness is not None and witness.value > self._witnessed().value:
                marks.new[JOURNAL] = witness
            self.table.store(marks.new)
        return [self._sign(request) if no is None else no for request, no in zip(asked, answers, strict=True)]

    def weigh(self, asked: Request) -> SigningRefused | None:
        """Whether it would be signed now, and why not. Nothing is stored and nothing signed."""
        try:
            check(self._rulebook, self.table, asked, int(self._clock()))
        except SigningRefused as no:
            return no
        return None

    def _sign(self, request: Request) -> bytes:
        key = self.keys[request.role]
        return key.sign_der(request.digest) if isinstance(request.struct, IdentityMessage) else key.sign(request.digest)

    def _witnessed(self) -> Mark:
        return self.table.get(JOURNAL) or Mark(0)

    @property
    def witness(self) -> Mark | None:
        """The highest record that any caller's journal had when it asked for something: it must still be there."""
        return self.table.get(JOURNAL)

    def meet(
        self,
        channels: Iterable[KnownChannel],
        head: Mark,
        *,
        adopting: bool,
        lost: bool = False,
        words: Iterable[KnownWord] = (),
    ) -> list[Ahead]:
        """Hold a journal against the table, or begin the table from it. Raises `SignerOutdated`.

        `lost`: the journal is an old copy whose owner goes on with it; it is the witness from here on.

        That the journal holds the witness is the caller's to check: the journal is not readable from here.
        """
        worker = KeyRole.WORKER in self.keys
        changes: dict[MarkKey, Mark] = {JOURNAL: head if lost else max(head, self._witnessed())}
        ahead: list[Ahead] = []
        if adopting:
            if not self.table.empty:
                raise SignerOutdated("a table that is in use cannot be begun anew")
            for channel in channels:
                changes.update(adopt(channel, worker=worker))
            changes.update(adopt_words(words))
        else:
            try:
                added, ahead = compare(channels, self.table, worker=worker, lost=lost, words=words)
            except LocalProtocolError as error:
                raise SignerOutdated(str(error)) from error
            changes.update(added)
        self.table.store(changes)
        self.met = True
        return ahead
