"""What `job` says of a batch job: as data, and in words with amounts in the token's unit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from node.client.client import Client
    from node.client.job import Job
    from protocol.batch import BatchState
    from protocol.typed_data import Domain, Quote
    from protocol.workload import ResultItem


async def shower(client: Client, domain: Domain, quote: Quote) -> Callable[[int], str]:
    """How to write amounts of the token that a job is paid in."""
    from node.ports import TokenInfo

    chain = client.jobs.vault_of(domain)
    info = TokenInfo(quote.token, "(smallest unit)", 0) if chain is None else await chain.token_info(quote.token)
    return info.show


def data_of(client: Client, job: Job) -> dict[str, Any]:
    """For `--json`. Amounts are decimal strings in the token's smallest unit."""
    from protocol.ids import ModelId

    state, told = job.state, job.told
    quote, chain = state.quote, client.jobs.vault_of(state.domain)
    data: dict[str, Any] = {
        "id": state.label,
        "job": state.job_id,
        "status": status_of(state),
        "chain": client.wallet.chains.name(chain.domain) if chain else f"chain {state.domain.chain_id}",
        "contract": str(state.domain.verifying_contract),
        "worker": state.peer,
        "model": str(ModelId(state.model_id)),
        "inputs": len(state.terms.input_tokens),
        "done": told.done if told else None,
        "token": str(quote.token),
        "amount": str(quote.amount),
        "claimed": str(state.claimed) if state.window_end else None,
        "paid": str(state.paid) if state.chain.name == "SETTLED" else None,
        "penalty": str(quote.penalty),
        "deadline": quote.deadline,
        "window": quote.window,
        "window_end": state.window_end or None,
        "resolver": str(quote.resolver) if any(quote.resolver) else None,
        "spec_hash": quote.spec_hash,
        "result_hash": state.checked.result_hash if state.checked else None,
        "cancelled": state.cancelled,
        "failure": told.failure if told and told.failure else None,
        "refused": state.refused.reason if state.refused else None,
        "trouble": client.jobs.steps.troubles.get(state.job_id),
    }
    return data


def status_of(state: BatchState) -> str:
    """One word for where the job stands."""
    if state.void:
        return "void"
    return "ordered" if state.chain.name == "NONE" else state.chain.name.lower()


def words_of(job: Job, show: Callable[[int], str]) -> str:
    """What has happened, what will happen by itself, and what the client can do."""
    state, told = job.state, job.told
    quote = state.quote
    lines = [f"job      {state.label}  ({state.job_id})", f"worker   {state.peer}"]
    count = len(state.terms.input_tokens)
    done = f", {told.done} of {told.total} done" if told and state.checked is None else ""
    lines.append(f"inputs   {count}{done}" + (", cancelled" if state.cancelled else ""))
    lines.append(f"status   {_now(state, show)}")
    if told and told.failure:
        lines.append(f"failure  {told.failure}")
    if state.chain.name == "OPEN":
        lines.append(f"deadline {when(quote.deadline)}: without a submission everything comes back by itself then")
    if quote.penalty:
        lines.append(f"penalty  {show(quote.penalty)} of the worker's stake answers for it")
    return "\n".join(lines)


def _now(state: BatchState, show: Callable[[int], str]) -> str:
    quote = state.quote
    match status_of(state):
        case "ordered":
            until = when(quote.valid_before)
            return f"ordered for up to {show(quote.amount)}; nothing is locked yet, and after {until} nothing will be"
        case "void":
            return "never opened: nothing was locked or paid; its id is free"
        case "open":
            ready = "; the result is here, verified" if state.checked else ""
            return f"{show(quote.amount)} is locked{ready}"
        case "submitted" if state.accepted:
            return f"accepted for {show(state.accepted.amount)}; the worker hands that in"
        case "submitted" if state.refused or (state.checked and state.claimed > state.checked.cost):
            end = f"{show(state.claimed)} is paid when the window ends, {when(state.window_end)}"
            way = "; dispute it before" if any(quote.resolver) else ", and no resolver is named to dispute it"
            return f"what was submitted is not the result: {end}{way}"
        case "submitted":
            return f"submitted, {show(state.claimed)} claimed; silence accepts it at {when(state.window_end)}"
        case "disputed":
            return f"disputed; a silent resolver makes it a draw at {when(state.resolve_by)}"
        case "settled":
            back = quote.amount - state.paid
            return f"settled: {show(state.paid)} paid, {show(back)} came back"
        case _:
            return f"refunded: {show(quote.amount)} came back"


def when(seconds: int) -> str:
    """Chain seconds as people write them."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError):
        return f"{seconds} (chain seconds)"


def item_data(index: int, item: ResultItem) -> dict[str, Any]:
    return {
        "index": index,
        "text": item.text,
        "finish_reason": item.finish_reason,
        "output_tokens": len(item.token_ids),
    }


def item_line(item: ResultItem) -> str:
    """One line for one input, whatever line ends the model wrote."""
    return " ".join(item.text.split())


class Bar:
    """How far it is, on a terminal's stderr; nothing elsewhere."""

    def __init__(self, job: Job, *, shown: bool) -> None:
        self._job = job
        self._shown = shown and sys.stderr.isatty()
        self._last = ""

    def draw(self) -> None:
        told = self._job.told
        if not self._shown or told is None or not told.total:
            return
        full = 30 * told.done // told.total
        text = f"\r[{'#' * full}{'.' * (30 - full)}] {told.done} of {told.total}"
        if text != self._last:
            self._last = text
            print(text, end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._last:
            print(file=sys.stderr)


__all__: Sequence[str] = ("Bar", "data_of", "item_data", "item_line", "shower", "status_of", "when", "words_of")
