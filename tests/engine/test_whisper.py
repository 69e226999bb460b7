"""Whisper against transformers, token for token: tiny random weights, and tiny.en as its package ships it, on speech."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from node.runtime.engine import log_mel  # noqa: E402
from node.runtime.engine.errors import InvalidSequence, UnsupportedModel  # noqa: E402
from node.runtime.engine.models.whisper import Whisper, WhisperConfig  # noqa: E402

START, END, NO_TIMES, ENGLISH, GERMAN, TRANSCRIBE = 90, 91, 92, 93, 94, 95
CONFIG: dict[str, Any] = {
    "vocab_size": 101,
    "num_mel_bins": 80,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 56,
    "max_source_positions": 1500,
    "max_target_positions": 40,
    "decoder_start_token_id": START,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
}
GENERATION: dict[str, Any] = {
    "decoder_start_token_id": START,
    "eos_token_id": END,
    "pad_token_id": END,
    "no_timestamps_token_id": NO_TIMES,
    "suppress_tokens": [5, 6, START, *range(92, 101)],
    "begin_suppress_tokens": [7, END],
    "is_multilingual": False,
    "max_length": 40,
    "return_timestamps": False,
}
MANY: dict[str, Any] = {
    "is_multilingual": True,
    "lang_to_id": {"<|en|>": ENGLISH, "<|de|>": GERMAN},
    "task_to_id": {"transcribe": TRANSCRIBE, "translate": 96},
}


def sound_of(seed: int, seconds: float) -> Any:
    noise = torch.randn(int(seconds * log_mel.RATE), generator=torch.Generator().manual_seed(seed))
    return (noise * torch.linspace(0.01, 0.3, len(noise))).clamp(-1, 1)


def random_model(folder: Path, seed: int, *, ends_like: int | None = None, **generation: Any) -> Any:
    """A tiny model of transformers', written as a folder of ours. `ends_like`: a token that the end is made to resemble."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**CONFIG, init_std=0.3)).eval()
    for name, one in model.named_parameters():
        if "layer_norm" in name:
            torch.nn.init.normal_(one, 1.0 if name.endswith("weight") else 0.0, 0.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(one, 0.0, 0.2)
    if ends_like is not None:
        with torch.no_grad():
            rows = model.model.decoder.embed_tokens.weight
            rows[END] = rows[ends_like] + 0.1 * torch.randn(rows.shape[1])
    model.generation_config = transformers.GenerationConfig(**{**GENERATION, **generation})
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({**GENERATION, **generation}))
    return model


def their_tokens(model: Any, sound: Any, **more: Any) -> list[int]:
    """The text of transformers' greedy decoding, without prompt and end token."""
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=80)
    features = extractor(sound.numpy(), sampling_rate=log_mel.RATE, return_tensors="pt").input_features
    generated: list[int] = model.generate(features, return_timestamps=False, **more)[0].tolist()
    steering = {START, NO_TIMES, END, ENGLISH, GERMAN, TRANSCRIBE, 96, 50256, 50257, 50362}
    return [token for token in generated if token not in steering]


def test_frames_equal_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=80)
    for bins in (80, 128):
        theirs = transformers.WhisperFeatureExtractor(feature_size=bins).mel_filters.T
        assert abs(log_mel.mel_filters(bins).numpy() - theirs).max() < 1e-7
    mel = log_mel.LogMel(80)
    for seconds in (0.01, 3.3, 30.0):
        sound = sound_of(1, seconds)
        theirs = extractor(sound.numpy(), sampling_rate=log_mel.RATE, return_tensors="pt").input_features[0]
        assert theirs.shape == mel(sound).shape == (80, log_mel.FRAMES)
        assert (mel(sound) - theirs).abs().max() < 1e-4
    for bad in (torch.zeros(0), torch.zeros(log_mel.WINDOW + 1), torch.zeros(2, 100)):
        with pytest.raises(ValueError, match="window"):
            mel(bad)


def test_tokens_equal_transformers_on_random_weights(tmp_path: Path) -> None:
    seen, lengths, came_later = set(), set(), 0
    for seed in range(6):
        random_model(tmp_path / f"{seed}", seed)
        first = next(Whisper.load(tmp_path / f"{seed}").transcribe(sound_of(10 * seed, 2.0)))
        # What it would say first is what it may not say first, though later; and the end is as likely as that.
        theirs = random_model(tmp_path / f"{seed}", seed, begin_suppress_tokens=[first, END], ends_like=first)
        ours = Whisper.load(tmp_path / f"{seed}")
        for number in range(3):
            sound = sound_of(10 * seed + number, 2.0 + number)
            expected = their_tokens(theirs, sound)
            assert list(ours.transcribe(sound)) == expected
            assert list(ours.transcribe(sound, max_tokens=3)) == expected[:3]
            assert expected[0] != first
            came_later += first in expected
            lengths.add(len(expected))
            seen |= set(expected)
    assert came_later and min(lengths) < 20 < max(lengths)
    assert not seen & set(GENERATION["suppress_tokens"])


def test_a_model_of_many_languages_hears_which_one_it_is(tmp_path: Path) -> None:
    heard = set()
    for seed in range(6):
        theirs = random_model(tmp_path / str(seed), seed, **MANY)
        ours = Whisper.load(tmp_path / str(seed))
        assert dict(ours.config.languages) == {"en": ENGLISH, "de": GERMAN}
        sound = sound_of(seed, 2.0)
        by_name = {name: list(ours.transcribe(sound, name)) for name in ("en", "de")}
        assert by_name["de"] == their_tokens(theirs, sound, language="de", task="transcribe")
        expected = their_tokens(theirs, sound, task="transcribe")
        assert list(ours.transcribe(sound)) == expected
        heard |= {name for name, tokens in by_name.items() if tokens == expected and by_name["en"] != by_name["de"]}
        with pytest.raises(InvalidSequence, match="language"):
            list(ours.transcribe(sound, "tlh"))
    assert heard == {"en", "de"}


def test_the_cache_gives_what_a_whole_pass_gives(tmp_path: Path) -> None:
    """Decoded one by one, each token is the argmax of transformers' logits over everything before it."""
    theirs = random_model(tmp_path, 9)
    ours = Whisper.load(tmp_path)
    sound = sound_of(3, 4.0)
    tokens = list(ours.transcribe(sound))
    with torch.no_grad():
        ids = torch.tensor([[START, NO_TIMES, *tokens]])
        encoder = theirs.model.encoder(ours._mel(sound)[None]).last_hidden_state
        assert (encoder[0] - ours.encode(sound)).abs().max() < 1e-4
        logits = theirs(encoder_outputs=(encoder,), decoder_input_ids=ids).logits[0]
    for place, token in enumerate(tokens):
        banned = GENERATION["suppress_tokens"] + (GENERATION["begin_suppress_tokens"] if place == 0 else [])
        logits[place + 1, banned] = -torch.inf
        assert int(logits[place + 1].argmax()) == token


@pytest.mark.slow
def test_tiny_en_equals_transformers_on_speech(stored: Callable[[str], Path], speech: bytes) -> None:
    transformers = pytest.importorskip("transformers")
    import numpy as np

    folder = stored("whisper-tiny.en")
    theirs, report = transformers.WhisperForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())  # nothing missing, nothing unexpected
    ours = Whisper.load(folder)
    sound = torch.from_numpy(np.frombuffer(speech, "<i2").astype("f4") / 32768)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for piece, said in (
        (sound, "the lazy dog. Hello, my name is John."),
        (sound[:50_000], "the lazy dog."),
        (sound[-34_000:], "my name is John"),
        (sound_of(1, 1.0) * 0.01, ""),
    ):
        tokens = list(ours.transcribe(piece))
        assert tokens == their_tokens(theirs, piece)
        assert said in tokenizer.decode(tokens)
    held = sum(4 * one.numel() for one in theirs.parameters())
    assert held <= ours.weight_bytes < 1.01 * held  # nothing is held twice


@pytest.mark.parametrize(
    "change",
    [
        {"d_model": 25},
        {"d_model": 1 << 20},
        {"scale_embedding": True},
        {"activation_function": "relu"},
        {"max_source_positions": 1499},
        {"vocab_size": 91},
        {"suppress_tokens": [101]},
        {"suppress_tokens": "all"},
        {"no_timestamps_token_id": None},
        {"lang_to_id": {"<|en|>": 101}},
        {"lang_to_id": {"<|en|>": 3}, "task_to_id": {}},
    ],
)
def test_configs_that_are_not_built_are_refused(change: dict[str, Any]) -> None:
    WhisperConfig.parse(CONFIG, GENERATION)
    split = {key: value for key, value in change.items() if key in CONFIG or key.startswith(("scale", "activation"))}
    with pytest.raises(UnsupportedModel):
        WhisperConfig.parse(CONFIG | split, GENERATION | {k: v for k, v in change.items() if k not in split})
