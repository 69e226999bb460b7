"""Posting a batch job: the best quote, the order in the journal, and the wait until the contract has locked its amount.

Rules
- A job has the caller's own name. Posting the same name again is the same job: it is ordered, run and paid at most once (B9).
- The order is journaled before anything is signed; the keeper signs and sends it.
- What the day's limit does not let us order is no job, and keeps no name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import trio

from node.client import job_quotes
from node.client.job_quotes import JobWish, Quoted
from node.client.job_steps import JobSteps
from node.errors import ChainError, ConfigError, JobFailed, Timeout
from node.store.batch import BatchBook
from protocol.batch import BatchOrdered, BatchState
from protocol.errors import InvalidValue
from protocol.escrow import JobState
from protocol.ids import Hash32, JobId
from protocol.messages import ChatMessage, Params, encode, quote_to_wire
from protocol.selection import Policy
from protocol.signing import QuotedOrder
from protocol.typed_data import Order
from protocol.workload import PLACE, BatchSpec, content_hash, encode_spec

if TYPE_CHECKING:
    from node.client.client import Client

LABEL_MOST: Final = 128
Confirm = Callable[[Quoted], Awaitable[None]]


class JobPosting:
    """Of one client, one job at a time."""

    def __init__(self, *, client: Client, book: BatchBook, steps: JobSteps, has_chains: bool, poll_s: float) -> None:
        """`has_chains`: whether any chain of ours has a Jobs contract."""
        self._client = client
        self._book = book
        self._steps = steps
        self._has_chains = has_chains
        self._poll_s = poll_s
        self._lock = trio.Lock()

    async def post(
        self,
        model: str,
        inputs: Sequence[str],
        *,
        id: str,  # noqa: A002 (the word that callers use)
        messages: Sequence[Mapping[str, str] | ChatMessage] = ({"role": "user", "content": PLACE},),
        wish: JobWish | None = None,
        policy: Policy | None = None,
        confirm: Confirm | None = None,
        **params: object,
    ) -> JobId:
        """Order a job, or go on with the one of that name. Returns when the contract has locked its amount.

        `confirm` sees the quote before it is ordered; when it raises, nothing is ordered.

        Raises `ConfigError` for what cannot be asked, `NoWorker` (with every worker's reason), `InsufficientFunds`, `Refused`,
        `SignerRefused` (over the day's limit, say), `ChainError`, `NetworkError` or `Timeout`. After an error
        the same call with the same `id` goes on where it stopped.
        """
        if not 1 <= len(id) <= LABEL_MOST or not id.isprintable():
            raise ConfigError(f"a job's id has 1 to {LABEL_MOST} printable characters")
        wish = wish or JobWish()
        async with self._lock:
            state = self._book.named(id)
            spec, raw = self._spec(model, inputs, messages, params, state)
            if state is not None and not state.void:
                if state.quote.spec_hash != content_hash(raw):
                    raise ConfigError(
                        f"the id {id!r} is that of another job, {state.job_id}", hint="choose another --id"
                    )
                other = wish.against(state.quote, state.domain)
                if other:
                    raise ConfigError(
                        f"job {id!r} was ordered on other terms: {'; '.join(other)}",
                        hint=f"gristmill job show {id}; what is asked for on these terms needs another --id",
                    )
            else:
                state = await self._order(id, model, spec, raw, wish, policy or Policy(), confirm)
        return await self._opened(state, wish)

    def _spec(
        self,
        model: str,
        inputs: Sequence[str],
        messages: Sequence[Mapping[str, str] | ChatMessage],
        params: Mapping[str, object],
        known: BatchState | None,
    ) -> tuple[BatchSpec, bytes]:
        model_id: Hash32 = self._client.choosing.model_id(model)
        if known is not None and not any(model_id):
            model_id = known.model_id  # nobody offers it now; the job of that name says which it was
        try:
            spec = BatchSpec(
                model_id=bytes(model_id),
                params=Params(**params),  # type: ignore[arg-type]
                messages=tuple(m if isinstance(m, ChatMessage) else ChatMessage(**m) for m in messages),  # type: ignore[arg-type]
                inputs=tuple(inputs),
            )
            return spec, encode_spec(spec)
        except (TypeError, InvalidValue) as error:
            raise ConfigError(f"this job cannot be posted: {error}") from None

    async def _order(
        self,
        label: str,
        model: str,
        spec: BatchSpec,
        raw: bytes,
        wish: JobWish,
        policy: Policy,
        confirm: Confirm | None,
    ) -> BatchState:
        """The best quote, journaled as ordered. Nothing is signed yet."""
        if not self._has_chains:
            raise ChainError("no chain here has a Jobs contract", hint="use `gristmill chat`, or another network")
        quoted = await job_quotes.best(self._client, model, spec, raw, wish, policy)
        quote, domain = quoted.quote, quoted.domain
        # What the day's limit does not let us order is no job, and keeps no name.
        await self._client.wallet.payer.weigh(QuotedOrder(quote, Order(quote.job_id(domain))), domain)
        if confirm is not None:
            await confirm(quoted)
        change = BatchOrdered(
            job_id=quote.job_id(domain),
            chain_id=domain.chain_id,
            contract=domain.verifying_contract,
            label=label,
            peer=str(quoted.peer),
            address=quoted.address,
            model_id=Hash32(spec.model_id),
            quote=encode(quote_to_wire(quote)),
            quote_signature=quoted.signature,
            terms=quoted.raw_terms,
            order_signature=b"",
        )
        await self._book.change([change])
        return self._book.jobs[change.job_id]

    async def _opened(self, state: BatchState, wish: JobWish) -> JobId:
        """Wait until the contract has locked the amount. The keeper sends the order. Raises `SignerRefused` as soon as it cannot,
        besides what `post` raises of a worker that does not open it."""
        job_id, until = state.job_id, trio.current_time() + wish.open_s
        while True:
            state = self._book.jobs[job_id]
            if state.chain is not JobState.NONE:
                return job_id
            if job_id in self._steps.unsigned and not state.void:
                raise self._steps.unsigned[job_id]
            trouble = self._steps.troubles.get(job_id, "")
            if state.void:
                raise JobFailed(
                    f"job {state.label!r} was not opened in time" + (f": {trouble}" if trouble else ""),
                    hint="nothing was paid; post it again",
                )
            if trio.current_time() >= until:
                raise Timeout(
                    f"the worker has not opened job {state.label!r}" + (f": {trouble}" if trouble else ""),
                    hint="post it again with the same --id; nothing is paid twice",
                )
            await self._book.changed(min(1.0, self._poll_s))
