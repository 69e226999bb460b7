"""What our own runtime gives, held to what the client will hold us to: numbers of any task, and all of the tasks other than chat.

A wrong row is found here, before it is sold: then the job fails as our fault and costs nothing, where the client would have
called it a lie.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Final

from node.errors import ModelError
from node.ports import Step
from protocol.errors import InvalidValue
from protocol.job import TEXT_PER_TOKEN, TEXT_SLACK, Terms
from protocol.logprobs import check
from protocol.messages import DATA_PER_CHUNK, FinishReason
from protocol.tasks import finite

_ENDS: Final = frozenset({FinishReason.STOP, FinishReason.LENGTH})


async def with_logprobs(steps: AsyncIterator[Step], count: int | None) -> AsyncGenerator[Step, None]:
    """The same steps of a chat, with the log probabilities that were asked for and no others. Raises `ModelError`."""
    async for step in steps:
        try:
            check(step.token_ids, step.data, count)
        except InvalidValue as error:
            raise ModelError(f"the runtime's numbers are wrong: {error}") from None
        if len(step.data) > DATA_PER_CHUNK:
            raise ModelError("the runtime gave more tokens in one step than fit into a chunk")
        yield step


async def sellable(
    steps: AsyncIterator[Step], terms: Terms, exhausted: Callable[[], bool]
) -> AsyncGenerator[Step, None]:
    """The same steps, numbers cut so that each fits into one chunk, up to the one that ends the answer.

    `exhausted`: whether all input was taken. Raises `ModelError` for what no client would accept.
    """
    units = text = 0
    async for step in steps:
        if terms.shape.rows:
            _check_rows(step, terms, units)
            units += len(step.data) // terms.shape.row_bytes
            whole = units == terms.shape.rows
        else:
            units, text = units + len(step.token_ids), text + len(step.text)
            _check_text(step, terms, units, text)
            whole = exhausted()
        if step.finish_reason is not None and step.finish_reason not in _ENDS:
            raise ModelError(f"the runtime may not end a task by {step.finish_reason.code}")
        if step.finish_reason is FinishReason.STOP and not whole:
            raise ModelError("the runtime ended before its input did")
        if step.finish_reason is FinishReason.LENGTH and (terms.shape.rows or units < terms.output_limit):
            raise ModelError("the runtime ended before max_tokens")
        for piece in _pieces(step, terms.shape.row_bytes):
            yield piece
        if step.finish_reason is not None:
            return


def _check_rows(step: Step, terms: Terms, before: int) -> None:
    shape = terms.shape
    if step.token_ids or step.text:
        raise ModelError("the runtime gave text where numbers were asked for")
    if len(step.data) % shape.row_bytes:
        raise ModelError(f"the runtime gave rows of another width than {shape.row_bytes // 4}")
    if before + len(step.data) // shape.row_bytes > shape.rows:
        raise ModelError(f"the runtime gave more than {shape.rows} rows")
    if not finite(step.data):
        raise ModelError("the runtime computed values that are no numbers")


def _check_text(step: Step, terms: Terms, units: int, text: int) -> None:
    if step.data:
        raise ModelError("the runtime gave numbers where text was asked for")
    if units > terms.output_limit:
        raise ModelError(f"the runtime gave more than {terms.output_limit} tokens")
    if text > TEXT_PER_TOKEN * units + TEXT_SLACK:
        raise ModelError("the runtime gave more text than its tokens can carry")


def _pieces(step: Step, row_bytes: int) -> Iterator[Step]:
    if len(step.data) <= DATA_PER_CHUNK:
        yield step
        return
    size = DATA_PER_CHUNK // row_bytes * row_bytes
    for start in range(0, len(step.data), size):
        last = start + size >= len(step.data)
        yield Step((), "", step.finish_reason if last else None, step.data[start : start + size])
