"""Several answers to one request on a terminal and for machines: `chat --n`.

For people one answer after the other, each whole, because two at a time cannot be read. With --json every chunk is a line as
it comes, with the index of its answer, and the last line has all of them, what each cost and the sum. One that failed is named
beside those that did not; the command then ends with that error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from node.cli.answer import choice_data, chunk_data, receipt_data
from node.cli.main import Shared

if TYPE_CHECKING:
    from node.client.answers import Answer, Answers
    from node.client.client import Client


async def tell_answers(shared: Shared, client: Client, answers: Answers) -> None:
    """Raises the first error of an answer, after everything is told."""
    output = shared.output
    texts = [""] * len(answers.answers)
    async with answers:
        async for answer, chunk in answers:
            texts[answer.index] += chunk.text
            if output.json:
                output.row(chunk_data(client, answer.stream, chunk, answer.index))
    for contradiction in client.evidence.told:
        output.say(contradiction)
    if output.json:
        output.row(_summary(client, answers, texts))
    else:
        for answer in answers.answers:
            output.write(f"[{answer.index + 1}] {texts[answer.index]}\n")
        await _account(shared, client, answers)
    if answers.errors:
        raise answers.errors[0][1]


def _summary(client: Client, answers: Answers, texts: list[str]) -> dict[str, Any]:
    state, allocation = answers.opened or (None, b"")
    models = {str(answer.stream.model_id) for answer in answers.answers if answer.stream.model_id is not None}
    return {
        "model": next(iter(models), None),
        "task": answers.answers[0].stream.task.value,
        "choices": [_choice(answer, texts[answer.index]) for answer in answers.answers],
        "usage": _used(answers),
        "cost": str(answers.cost),
        "chain": client.wallet.chains.name(state.domain) if state else None,
        "token": str(state.config.token) if state else None,
        "allocation_transaction": allocation or None,
    }


def _choice(answer: Answer, text: str) -> dict[str, Any]:
    stream, error = answer.stream, answer.error
    return {
        **choice_data(stream, answer.index, text),
        "seed": stream.params.seed,
        "worker": stream.worker,
        "channel": stream.channel_id,
        "usage": _used(stream),
        "cost": str(stream.cost),
        "receipt": None if stream.receipt is None else receipt_data(stream.receipt),
        "receipt_signature": stream.receipt_signature,
        "error": None
        if error is None
        else {"code": error.code, "message": error.message, "hint": error.hint, **error.details()},
    }


def _used(of: Any) -> dict[str, int]:
    return {"input_tokens": of.usage.input_tokens, "output_tokens": of.usage.output_tokens}


async def _account(shared: Shared, client: Client, answers: Answers) -> None:
    whole = sum(answer.error is None for answer in answers.answers)
    used = answers.usage
    if answers.opened is None:
        return
    state = answers.opened[0]
    info = await client.wallet.chains.of(state.domain).token_info(state.config.token)
    for index, error in answers.errors:
        shared.output.say(f"answer {index + 1} is not whole: {error.message}")
    shared.output.say(
        f"\nanswers  {whole} of {len(answers.answers)} whole, each with a receipt of its own\n"
        f"usage    {used.input_tokens} tokens in, {used.output_tokens} out, in all\n"
        f"cost     {info.show(answers.cost)} in all"
    )
