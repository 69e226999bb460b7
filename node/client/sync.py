"""The same client for code without trio: one background thread runs the event loop, calls cross over and wait.

with sync_client(config) as client:
    client.deposit(5_000_000)
    with client.chat("smollm2-135m-instruct", [{"role": "user", "content": "Hello"}]) as stream:
        for chunk in stream:
            print(chunk.text, end="")
    print(stream.receipt)
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import trio

from node.client.answers import Answer, Answers
from node.client.chat import ChatStream
from node.client.client import Client
from node.client.connect import connect
from node.client.tasks import Ranking, Vectors
from node.client.values import ChatChunk
from node.ports import TxResult
from protocol.offers import Asset

if TYPE_CHECKING:
    from node.config import Config

T = TypeVar("T")
S = TypeVar("S", ChatStream, Answers)
_Request = tuple[Callable[[], Awaitable[Any]], "SimpleQueue[tuple[bool, Any]]"]


class SyncClient:
    """Blocking twin of `Client`; made by `sync_client`. One caller at a time per stream."""

    def __init__(self, client: Client, call: Callable[[Callable[[], Awaitable[Any]]], Any]) -> None:
        self._client = client
        self._call = call

    def deposit(self, amount: int, asset: Asset | None = None) -> list[TxResult]:
        return list(self._call(lambda: self._client.deposit(amount, asset)))

    def balance(self, asset: Asset | None = None) -> int:
        return int(self._call(lambda: self._client.balance(asset)))

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], **options: Any) -> SyncChatStream:
        return SyncChatStream(self._client.chat(model, messages, **options), self._call)

    def answers(self, model: str, messages: Sequence[Mapping[str, str]], n: int, **options: Any) -> SyncAnswers:
        return SyncAnswers(self._client.answers(model, messages, n, **options), self._call)

    def embed(self, model: str, texts: Sequence[str], **options: Any) -> Vectors:
        made: Vectors = self._call(lambda: self._client.embed(model, texts, **options))
        return made

    def rerank(self, model: str, query: str, documents: Sequence[str], **options: Any) -> Ranking:
        made: Ranking = self._call(lambda: self._client.rerank(model, query, documents, **options))
        return made

    def transcribe(self, model: str, audio: bytes | Iterable[bytes], **options: Any) -> SyncChatStream:
        """`audio`: as `Client.transcribe`, or an iterable of samples as they come, which is read in a thread of its own."""
        source = audio if isinstance(audio, bytes | bytearray | memoryview) else _lifted(audio)
        return SyncChatStream(self._client.transcribe(model, source, **options), self._call)

    def ocr(self, model: str, image: bytes, **options: Any) -> SyncChatStream:
        return SyncChatStream(self._client.ocr(model, image, **options), self._call)

    @property
    def client(self) -> Client:
        """The trio client, for reading its state."""
        return self._client


async def _lifted(source: Iterable[bytes]) -> AsyncIterator[bytes]:
    """A blocking source, one piece at a time."""
    iterator = iter(source)
    while (data := await trio.to_thread.run_sync(next, iterator, None, abandon_on_cancel=True)) is not None:
        yield data


class _SyncStream(Generic[S, T]):
    """A stream of the trio client, entered, read and left from here; its attributes are that stream's own."""

    def __init__(self, stream: S, call: Callable[[Callable[[], Awaitable[Any]]], Any]) -> None:
        self._stream: S = stream
        self._call = call

    def __enter__(self) -> Self:
        self._call(self._stream.__aenter__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(lambda: self._stream.__aexit__(kind, error, trace))

    def __iter__(self) -> Iterator[T]:
        while True:
            try:
                yield self._call(self._stream.__anext__)
            except StopAsyncIteration:
                return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class SyncChatStream(_SyncStream[ChatStream, ChatChunk]):
    """Blocking twin of `ChatStream`; its attributes (`receipt`, `parts`, `usage`, ...) are the stream's own."""

    def text(self) -> str:
        """The whole answer."""
        return "".join(chunk.text for chunk in self)


class SyncAnswers(_SyncStream[Answers, tuple[Answer, ChatChunk]]):
    """Blocking twin of `Answers`; its attributes (`answers`, `errors`, `cost`, ...) are those of the answers."""


@contextmanager
def sync_client(config: Config, **options: Any) -> Iterator[SyncClient]:
    """A connected blocking client; `options` are those of `node.client.connect.connect`. Raises as it does."""
    ready: SimpleQueue[tuple[bool, Any]] = SimpleQueue()

    async def serve() -> None:
        stop = trio.Event()
        token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            async with connect(config, **options) as client:

                def call(work: Callable[[], Awaitable[T]]) -> T:
                    answer: SimpleQueue[tuple[bool, Any]] = SimpleQueue()

                    async def run() -> None:
                        try:
                            answer.put((True, await work()))
                        except BaseException as error:  # crosses to the calling thread, whatever it is
                            answer.put((False, error))
                            if isinstance(error, trio.Cancelled):
                                raise

                    token.run_sync_soon(nursery.start_soon, run)
                    good, value = answer.get()
                    if good:
                        return value  # type: ignore[no-any-return]
                    raise value

                ready.put((True, (SyncClient(client, call), lambda: token.run_sync_soon(stop.set))))
                await stop.wait()
            nursery.cancel_scope.cancel()

    def main() -> None:
        try:
            trio.run(serve)
        except BaseException as error:  # a failed start crosses to the caller; later ones end the thread
            ready.put((False, error))

    thread = threading.Thread(target=main, name="gristmill client", daemon=True)
    thread.start()
    good, value = ready.get()
    if not good:
        raise value
    client, stop = value
    try:
        yield client
    finally:
        stop()
        thread.join()
