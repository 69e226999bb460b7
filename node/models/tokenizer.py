"""Text to tokens and back, for one model folder of the store. Imports no torch: clients may use it to count tokens.

Only byte-level BPE tokenizers are accepted (GPT-2, Llama 3, SmolLM, Qwen): each token is then a fixed string of bytes,
and a stream's text is exactly the UTF-8 decoding of its tokens' bytes, however it is cut.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers

from node import nesting
from node.errors import ModelError, PromptInvalid
from node.models.template import Renderer

MAX_TEXT: Final = 4 << 20
"""Characters of one text to encode."""


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: every byte has one printable character, and the printable ASCII and Latin-1 ones keep theirs."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES: Final = _byte_of_character()


class Tokenizer:
    """Tokenizer and chat template of one model. Close it to end the template process."""

    def __init__(self, folder: Path) -> None:
        """Load from a model folder. Raises `ModelError` when the tokenizer is missing, damaged or of another kind."""
        raw = (folder / "tokenizer.json").read_bytes()
        try:
            decoder = (nesting.loads(raw).get("decoder") or {}).get("type")
            self._tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:  # the library raises bare Exception for a bad file
            raise ModelError(f"tokenizer.json cannot be read: {error}"[:300]) from None
        if decoder != "ByteLevel":
            raise ModelError(f"tokenizer decoder {decoder!r} is not supported", hint="supported: ByteLevel")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special: Final = frozenset(index for index, token in added.items() if token.special)
        self._renderer: Final = _renderer(folder)
        self._pieces: dict[int, bytes] = {}

    @property
    def vocab_size(self) -> int:
        """Number of tokens with a text, special ones included. A model may have a few more rows."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that steer (end of turn and the like) and have no text of their own."""
        return self._special

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written out in it count as such; nothing is added.

        Raises `PromptInvalid` when it is too long or holds lone surrogates.
        """
        if len(text) > MAX_TEXT:
            raise PromptInvalid(f"the text is longer than {MAX_TEXT} characters")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PromptInvalid("the text holds lone surrogates, which no UTF-8 text can") from None
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def bytes_of(self, token_id: int) -> bytes:
        """What this token adds to the text: nothing for a special token or an id without one."""
        piece = self._pieces.get(token_id)
        if piece is None:
            token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
            piece = _token_bytes(token) if token else b""
            self._pieces[token_id] = piece
        return piece

    def name_of(self, token_id: int) -> str:
        """How a token is shown by itself: its text, or the name of a special one; empty for an id without one."""
        if token_id in self._special:
            return str(self._tokenizer.id_to_token(token_id))
        return self.bytes_of(token_id).decode("utf-8", errors="replace")

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", errors="replace")

    def written_out(self, ids: Sequence[int]) -> str:
        """The text that `encode` turns into exactly these ids, special tokens written out. Raises `PromptInvalid`
        when none does."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        if self.encode(text) != list(ids):
            raise PromptInvalid("no text has exactly these tokens")
        return text

    def word_ends(self, text: str) -> list[int]:
        """Where the pieces end that the tokenizer cuts a text into before it looks for tokens: no token crosses such
        an end."""
        cutter = self._tokenizer.pre_tokenizer
        return [end for _, (_, end) in cutter.pre_tokenize_str(text)] if cutter is not None else [len(text)]

    def detokenizer(self, delivered: Sequence[int] = ()) -> Detokenizer:
        """A decoder for one stream; `delivered` are ids whose text the reader already has."""
        detokenizer = Detokenizer(self)
        detokenizer.push(delivered)
        return detokenizer

    def chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation by the model's own template. Raises `PromptInvalid`, or `ModelError` without one."""
        return self.encode(self.chat_text(messages, add_generation_prompt=add_generation_prompt))

    def chat_text(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as the template writes it."""
        if self._renderer is None:
            raise ModelError("this model has no chat template", hint="use plain completion")
        if not messages:
            raise PromptInvalid("a conversation needs at least one message")
        return self._renderer.render(messages, add_generation_prompt=add_generation_prompt)

    def warm(self) -> None:
        """Start the template process now (about 0.1 s) instead of at the first conversation."""
        if self._renderer is not None:
            self._renderer.warm()

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()


class Detokenizer:
    """Text of one stream, piece by piece: the pieces joined are `Tokenizer.decode` of all ids.

    Bytes of an unfinished character wait for the next token, at most three of them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        return self._decoder.decode(b"".join(map(self._tokenizer.bytes_of, ids)))

    def finish(self) -> str:
        """What an unfinished character at the end becomes: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)


def _token_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:  # an added token is written as it is
        return token.encode()


def _renderer(folder: Path) -> Renderer | None:
    config: dict[str, Any] = {}
    path = folder / "tokenizer_config.json"
    if path.is_file():
        try:
            config = nesting.loads(path.read_bytes())
            tokens = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        except (ValueError, AttributeError, RecursionError) as error:
            raise ModelError(f"tokenizer_config.json cannot be read: {error}"[:300]) from None
    else:
        tokens = {}
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not isinstance(template, str):
        return None
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return Renderer(template, {name: text for name, text in texts.items() if isinstance(text, str)})
