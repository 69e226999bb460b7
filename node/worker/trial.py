"""A small real job on every model that does something else than chat, before any of it is offered."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from node.errors import ModelError
from node.ports import TaskBackend
from node.worker.output import sellable
from protocol.ids import ZERO_ADDRESS, ZERO_HASH, ChannelId, JobId, ModelId
from protocol.job import Terms
from protocol.messages import Params
from protocol.pricing import Price
from protocol.tasks import Task, media_of, sample_request, shape_of
from protocol.typed_data import MARKET_DOMAIN, Ask


async def try_tasks(tasks: TaskBackend) -> dict[ModelId, float]:
    """Seconds that each model took for a sample of each of its tasks. Raises `ModelError` when an answer could not be sold."""
    spent = {}
    for model, info in tasks.models.items():
        began = time.perf_counter()
        for task in info.tasks:
            if task is not Task.CHAT:
                await _try(tasks, model, task, info.dimensions)
        spent[model] = time.perf_counter() - began
    return spent


async def _try(tasks: TaskBackend, model: ModelId, task: Task, dimensions: int) -> None:
    request, params = sample_request(task), Params()
    shape = shape_of(request, dimensions)
    prepared = tasks.prepare(model, request)
    if shape.units not in (None, prepared.units):
        raise ModelError(f"the runtime counts {prepared.units} units where there are {shape.units}")
    nobody = Ask(
        JobId(ZERO_HASH), 0, ChannelId(ZERO_HASH), ZERO_ADDRESS, model, ZERO_HASH, ZERO_HASH, ZERO_HASH, deadline=0
    )
    terms = Terms(
        domain=MARKET_DOMAIN,
        ask=nobody,
        params=params,
        price=Price(),
        input_limit=prepared.units,
        receiver_authorizer=ZERO_ADDRESS,
        payer_authorizer=ZERO_ADDRESS,
        tick_tokens=1,
        credit_tokens=0,
        shape=shape,
    )
    ended = False

    async def media() -> AsyncGenerator[bytes, None]:
        if media_of(request):
            yield media_of(request)

    async with aclosing(media()) as sound, aclosing(tasks.run(prepared, params, sound)) as raw:
        async for step in sellable(raw, terms, lambda: True):
            ended = step.finish_reason is not None
    if not ended:
        raise ModelError(f"{tasks.models[model].name}: the answer to a sample of {task.value} did not end")
