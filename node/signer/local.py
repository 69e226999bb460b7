"""A signer in the process of its caller: the same policy, the same table, no wall around the keys.

For tests, tools, throw-away keys, and for whoever sets `keys.signer = "inline"`. Whoever waits while another commit is synced
shares the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import trio

from node.errors import SignerFailed, SignerRefused
from node.signer.core import Core
from node.signer.keys import Answer, Asked, Follow, Signers, refused
from node.signer.table import Table
from protocol.errors import InvalidValue
from protocol.identity import IdentityMessage
from protocol.keys import PrivateKey
from protocol.signing import KeyRole, Mark, Policy, Request, Signable, SigningReason, SigningRefused, request
from protocol.signing_history import Ahead, KnownChannel, KnownWord
from protocol.typed_data import Domain


class LocalSigners(Signers):
    """Made by `open_local`, or from a table that the caller has opened."""

    def __init__(
        self,
        keys: Mapping[KeyRole, PrivateKey],
        policy: Policy,
        table: Table,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.core = Core(keys, policy, table, clock)
        public = {role: key.public_key for role, key in keys.items()}
        super().__init__(public, table.identity, empty=table.empty, witness=self.core.witness)
        self._following = Follow()
        self._waiting: list[tuple[list[Request], trio.Event, list[Answer]]] = []
        self._writing = trio.Lock()

    @property
    def failure(self) -> str | None:
        return self.core.table.failure

    async def ask(self, asked: Sequence[Asked]) -> list[Answer]:
        requests = [request(role, struct, domain) for role, struct, domain in asked]
        if not self.core.table.durable:  # nothing to wait for
            await trio.lowlevel.checkpoint_if_cancelled()
            answers = self._handle(requests)
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            return answers
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            return await self._in_turn(requests)

    async def _in_turn(self, requests: list[Request]) -> list[Answer]:
        """Whoever gets the lock commits for all who wait."""
        done, answers = trio.Event(), list[Answer]()
        self._waiting.append((requests, done, answers))
        async with self._writing:
            if not done.is_set():
                group, self._waiting = self._waiting, []
                together = [one for asked, _, _ in group for one in asked]
                found = iter(await trio.to_thread.run_sync(self._handle, together))
                for asked, event, into in group:
                    into += [next(found) for _ in asked]
                    event.set()
        return answers

    def _handle(self, requests: Sequence[Request]) -> list[Answer]:
        answers = self.core.handle(requests, self._following.head())
        return [refused(one) if isinstance(one, SigningRefused) else one for one in answers]

    async def weigh(self, role: KeyRole, struct: Signable, domain: Domain) -> None:
        async with self._writing:
            if self.failure is not None:
                raise SignerFailed(self.failure)
            no = self.core.weigh(request(role, struct, domain))
        if no is not None:
            raise refused(no)

    def ask_identity(self, role: KeyRole, data: bytes) -> bytes:
        try:
            asked = request(role, IdentityMessage.decode(data), None)
        except InvalidValue as error:
            raise SignerRefused(SigningReason.KIND, str(error)) from None
        (answer,) = self.core.handle([asked])
        if isinstance(answer, SigningRefused):
            raise refused(answer)
        return answer

    async def meet(
        self,
        channels: Iterable[KnownChannel],
        head: Mark,
        *,
        adopting: bool,
        lost: bool = False,
        words: Sequence[KnownWord] = (),
        following: Follow,
    ) -> list[Ahead]:
        if self.failure is not None:
            raise SignerFailed(self.failure)
        ahead = self.core.meet(channels, head, adopting=adopting, lost=lost, words=words)
        self._following = following
        return ahead

    def close(self) -> None:
        self.core.table.close()


def open_local(
    keys: Mapping[KeyRole, PrivateKey], policy: Policy, path: Path | None, *, clock: Callable[[], float] = time.time
) -> LocalSigners:
    """A signer with its table at `path`, or in memory when None. Raises `SignerError`."""
    accounts = {role: key.address for role, key in keys.items()}
    table = Table.in_memory(accounts) if path is None else Table.open(path, accounts)
    return LocalSigners(keys, policy, table, clock=clock)
