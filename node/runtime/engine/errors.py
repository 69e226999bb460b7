"""What the engine raises on purpose. The host maps these to refusals; anything else is a bug or a broken machine."""

from __future__ import annotations


class EngineError(Exception):
    """Root of the engine's errors; the engine's state is unchanged after one."""


class InvalidSequence(EngineError):
    """The sequence cannot run: empty prompt, token outside the vocabulary, id in use, nothing left to generate."""


class ContextOverflow(EngineError):
    """Prompt and answer together would pass the model's context length."""


class CacheFull(EngineError):
    """The KV budget cannot hold this sequence now; it may when others have ended."""


class UnsupportedModel(EngineError):
    """The folder holds a model that this engine does not run, or files that do not fit together."""


class IntegrityError(EngineError):
    """The engine's own books do not balance. A bug: stop using this engine."""
