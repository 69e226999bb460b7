"""What the runtime makes of an ask before anything is promised: tokens, units of media, a grammar.

Rules
- What takes long is done in a thread, and there are few: the loop waits for nobody's prompt.
- What the client asked for and cannot be is its own fault and says so; a runtime that fails is ours, and says no more.
"""

from __future__ import annotations

import logging

import trio
from msgspec import UnsetType

from node.errors import InputInvalid, ModelError, PromptInvalid
from node.ports import Backend, Prompt, TaskBackend, TaskInput
from protocol.admission import Rejected
from protocol.errors import RefusalReason
from protocol.ids import ModelId
from protocol.messages import AskMessage
from protocol.tasks import ChatRequest

log = logging.getLogger(__name__)


class Preparing:
    """For all streams of one worker."""

    def __init__(self, backend: Backend, tasks: TaskBackend | None) -> None:
        self._backend = backend
        self._tasks = tasks
        self._compiling = trio.CapacityLimiter(1)
        self._preparing = trio.CapacityLimiter(4)
        """Long prompts at once: what they wait for must not be all threads that there are."""

    async def check_format(self, ask: AskMessage) -> None:
        """Raises `Rejected` for an answer's format that cannot be kept to."""
        wanted = ask.params.response_format
        if isinstance(wanted, UnsetType):
            return
        try:
            check = self._backend.check_format
            await trio.to_thread.run_sync(check, ModelId(ask.model_id), wanted, ask.resume, limiter=self._compiling)
        except PromptInvalid as error:
            raise Rejected(RefusalReason.UNSUPPORTED_PARAM, f"response_format: {error.message}"[:300]) from None
        except ModelError as error:
            log.error("the model runtime cannot take a grammar: %s", error)
            raise Rejected(RefusalReason.INTERNAL, "the model runtime failed") from None

    async def prepare(self, ask: AskMessage) -> Prompt | TaskInput:
        """Tokenise; what is long, in a thread, and what comes meanwhile too: a template is rendered for one at a time, and the
        loop must not wait for its turn. Raises `Rejected`."""
        model, request = ModelId(ask.model_id), ask.request
        try:
            if isinstance(request, ChatRequest):
                if model not in self._backend.models:  # it was when the offer was signed
                    raise Rejected(RefusalReason.BUSY, "the model is not in service now")
                short = sum(len(m.content) for m in request.messages) < 16_384
                if short and not self._preparing.borrowed_tokens:
                    return self._backend.prepare(model, request.messages)
                prepare = self._backend.prepare
                return await trio.to_thread.run_sync(prepare, model, request.messages, limiter=self._preparing)
            if self._tasks is None:
                raise Rejected(RefusalReason.TASK_UNSUPPORTED, "only chats are served here")
            return await trio.to_thread.run_sync(self._tasks.prepare, model, request)
        except PromptInvalid as error:
            raise Rejected(RefusalReason.PROMPT_INVALID, str(error)[:300]) from None
        except InputInvalid as error:
            raise Rejected(RefusalReason.INPUT_INVALID, str(error)[:300]) from None
        except ModelError as error:
            log.error("the model runtime cannot take a prompt: %s", error)
            raise Rejected(RefusalReason.INTERNAL, "the model runtime failed") from None
