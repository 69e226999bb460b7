"""An answer as it comes, then what it cost: what `chat`, `embed` and `run` share.

The answer goes to stdout, worker, usage, cost and receipt to stderr. With --json every piece is a line, and the last line holds
the verified receipt.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from node.cli.main import Shared
from node.client.vocabulary import openai_logprobs

if TYPE_CHECKING:
    from node.client.chat import ChatStream
    from node.client.client import Client
    from node.client.values import ChatChunk
    from protocol.channel import ChannelState

Rows = Callable[[list[float]], tuple[dict[str, Any], str]]
"""One row of numbers: for machines, and as a line of text."""


async def tell(
    shared: Shared,
    client: Client,
    stream: ChatStream,
    opened: tuple[ChannelState, bytes],
    *,
    rows: Rows | None = None,
    width: int = 1,
) -> None:
    """`opened`: the channel that was opened for it, and how. `rows`: shows an answer of numbers, `width` in a row."""
    output = shared.output
    chain = client.wallet.chains.of(opened[0].domain)
    before = await chain.head()
    text = ""
    asked = stream.params.likeliest is not None
    async with stream:
        async for chunk in stream:
            text += chunk.text if asked else ""
            if rows is not None:
                for numbers in _rows(chunk.data, width):
                    output.row(*rows(numbers))
            elif output.json:
                output.row(chunk_data(client, stream, chunk))
            else:
                output.write(chunk.text)
    after = await chain.head()
    if not output.json and rows is None:
        output.write("\n")
    for contradiction in client.evidence.told:
        output.say(contradiction)
    choices = [choice_data(stream, 0, text)] if asked else []
    await _account(shared, client, stream, opened[1], (before.number, after.number), choices)


def chunk_data(client: Client, stream: ChatStream, chunk: ChatChunk, index: int | None = None) -> dict[str, Any]:
    """A chunk in the form of `--json`; of one of several answers, or with log probabilities, also as a chunk of OpenAI's API."""
    data: dict[str, Any] = {"text": chunk.text, "token_ids": chunk.token_ids, "cost": str(chunk.cost)}
    asked = stream.params.likeliest is not None
    if index is not None or asked:
        choice: dict[str, Any] = {"index": index or 0, "delta": {"content": chunk.text}, "logprobs": None}
        if asked:
            known = None if stream.model_id is None else client.vocabulary(stream.model_id)
            choice["logprobs"] = {"content": openai_logprobs(chunk.logprobs, known)}
        data["choices"] = [{**choice, "finish_reason": None}]
    return data


_FINISH = {"stop": "stop", "stop_string": "stop", "length": "length"}


def choice_data(stream: ChatStream, index: int, text: str) -> dict[str, Any]:
    """A whole answer as OpenAI's API has it. Log probabilities have come with the chunks, and are not said twice."""
    reason = None if stream.finish_reason is None else stream.finish_reason.code
    return {
        "index": index,
        "message": {"role": "assistant", "content": text},
        "finish_reason": _FINISH.get(reason or "", reason),
    }


async def _account(
    shared: Shared,
    client: Client,
    stream: ChatStream,
    allocation: bytes,
    blocks: tuple[int, int],
    choices: list[dict[str, Any]],
) -> None:
    from protocol.tasks import UNITS, Task

    output, receipt, timings = shared.output, stream.receipt, stream.timings
    if receipt is None:
        return
    channel = client.book.channels[receipt.channel_id]
    if output.json:
        summary = {
            "worker": stream.worker,
            "model": str(receipt.model_id),
            "task": stream.task.value,
            "usage": {"input_tokens": receipt.input_tokens, "output_tokens": receipt.output_tokens},
            "cost": str(receipt.cost),
            "finish_reason": stream.finish_reason,
            "seconds": {
                "accepted": timings.accepted,
                "first_token": timings.first_token,
                "ask_to_first_token": timings.first_token - timings.asked,
                "total": timings.finished,
            },
            "channel": stream.channel_id,
            "chain": client.wallet.chains.name(channel.domain),
            "token": str(channel.config.token),
            "allocation_transaction": allocation or stream.allocation_transaction or None,
            "blocks": {"before": blocks[0], "after": blocks[1]},
            "receipt": receipt_data(receipt),
            "receipt_signature": stream.receipt_signature,
            **({"choices": choices} if choices else {}),
        }
        output.row(summary)
        return
    info = await client.wallet.chains.of(channel.domain).token_info(channel.config.token)
    if stream.task is Task.CHAT:
        speed = receipt.output_tokens / max(timings.finished - timings.first_token, 1e-9)
        used = f"{receipt.input_tokens} tokens in, {receipt.output_tokens} out, {speed:.1f} tokens/s, "
    else:
        units = UNITS[stream.task]
        used = f"{receipt.input_tokens} x {units.input}, {receipt.output_tokens} x {units.output}, "
    output.say(
        f"\nworker   {stream.worker}\n"
        f"usage    {used}first {'token' if stream.task is Task.CHAT else 'output'} after "
        f"{1000 * max(0.0, timings.first_token - timings.asked):.0f} ms\n"
        f"cost     {info.show(receipt.cost)}\n"
        f"receipt  number {receipt.sequence} on channel {stream.channel_id}, verified"
    )


def _rows(data: bytes, width: int) -> Iterator[list[float]]:
    for start in range(0, len(data), 4 * width):
        yield list(struct.unpack_from(f"<{width}f", data, start))


def receipt_data(receipt: Any) -> dict[str, Any]:
    """A receipt in the form of `--json`: hashes as hex, amounts as decimal strings."""
    data = {field.name: getattr(receipt, field.name) for field in fields(receipt)}
    data["cost"] = str(receipt.cost)
    return {name: "0x" + value.hex() if isinstance(value, bytes) else value for name, value in data.items()}
