"""`models load|unload|swap|trace`: both ends of the control socket. One changes the fleet, the other shows how far that is."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from node.cli.main import Shared
from node.cli.models import TRACE_S
from node.errors import ModelError, NodeError
from node.groups import plain_errors

if TYPE_CHECKING:
    from node.models.manifest import Manifest
    from node.runtime.backend import TorchBackend
    from node.runtime.resident import Resident

CHANGE_S: Final = 3600.0
"""A load may take long, and streams that run are waited for."""
_LOOK_S: Final = 0.5
Handler = Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]]


def model_handlers(shared: Shared, models: TorchBackend | None) -> dict[str, Handler]:
    """Questions that a running worker answers about its models. Each raises `ModelError`."""

    def ours() -> TorchBackend:
        if models is None:
            raise ModelError("this worker's models are not its own to manage")
        return models

    def stored(name: object) -> Manifest:
        from node.models.store import ModelStore

        return ModelStore(shared.config.models_dir).resolve(str(name))

    def loaded(name: object) -> Resident:
        """By name or id, of the models that the worker has: its folder may be gone from the store."""
        found = [
            one for one in ours().fleet.residents.values() if str(name) in (one.manifest.name, str(one.manifest.id))
        ]
        if len(found) != 1:
            known = ", ".join(sorted(one.manifest.name for one in ours().fleet.residents.values())) or "none"
            raise ModelError(
                f"{name!r} is {'no' if not found else 'more than one'} model of this worker (it has: {known})"
            )
        return found[0]

    async def load(question: dict[str, Any]) -> Mapping[str, Any]:
        one = await ours().fleet.load(stored(question.get("model")))
        return {**one.report(), "text": f"{one.manifest.name}  {one.phase}"}

    async def unload(question: dict[str, Any]) -> Mapping[str, Any]:
        manifest = loaded(question.get("model")).manifest
        await ours().fleet.unload(manifest.id)
        return {"id": str(manifest.id), "text": f"{manifest.name}  unloaded"}

    async def swap(question: dict[str, Any]) -> Mapping[str, Any]:
        old, new = loaded(question.get("old")).manifest, stored(question.get("model"))
        beside = await ours().fleet.swap(old.id, new)
        gap = "" if beside else "  (there was no room for both: neither was sold for a while)"
        return {"id": str(new.id), "old": str(old.id), "beside": beside, "text": f"{new.name}  ready{gap}"}

    async def trace(question: dict[str, Any]) -> Mapping[str, Any]:
        from node.runtime import tracing

        one, seconds = loaded(question.get("model")), question.get("seconds")
        name = one.manifest.name
        if seconds is None:
            ended = tracing.end(one)
            if ended is None:
                return {"path": "", "steps": 0, "text": f"{name}  was not traced"}
            return {"path": str(ended.path), "steps": ended.steps, "text": f"{ended.path}  {ended.steps} steps"}
        if type(seconds) is not int or not 1 <= seconds <= TRACE_S:
            raise ModelError(f"a trace takes 1 to {TRACE_S} seconds")
        folder = shared.config.data_dir / "traces"
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / f"{name}-{one.manifest.id.hex()[:8]}.json"
        ours().fleet.keeper.trace(one, path, seconds)
        return {"path": str(path), "seconds": seconds, "text": f"{path}  for {seconds} s"}

    return {"models.load": load, "models.unload": unload, "models.swap": swap, "models.trace": trace}


async def watched(shared: Shared, action: str, what: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Ask for a change and wait for it; on a terminal, its stages go to stderr. Raises what `control.ask` raises."""
    import trio

    from node.worker import control

    path = shared.config.data_dir / "control.sock"

    async def show() -> None:
        said = ""
        while True:
            await trio.sleep(_LOOK_S)
            try:
                status = await control.ask(path, "status")
            except NodeError:  # the question itself will say so
                return
            wanted = arguments.get("model"), arguments.get("old")
            stages = [
                f"{one['name']} {one['phase']} {one.get('stage', '')}".strip()
                for one in status["models"]
                if "phase" in one and (one["name"] in wanted or one["id"] in wanted)
            ]
            now = f"{what}: {', '.join(stages)}"
            if now != said:
                said = now
                shared.output.say(now)

    with plain_errors():
        async with trio.open_nursery() as nursery:
            if sys.stderr.isatty():
                nursery.start_soon(show)
            answer = await control.ask(path, f"models.{action}", timeout_s=CHANGE_S, **arguments)
            nursery.cancel_scope.cancel()
    return answer
