"""The sentence encoder and the classifier, against transformers: tiny random weights, and MiniLM as its package ships it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from node.runtime.engine.errors import InvalidSequence, UnsupportedModel  # noqa: E402
from node.runtime.engine.models.bert import Bert, BertConfig, Row  # noqa: E402

TINY = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}
TEXTS = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "hello",
    "",
    "mill " * 250,
    "Two stones grind against each other, and the upper one turns. " * 9,
]


def rows(count: int, longest: int, vocab: int = 101, *, pairs: bool = False) -> list[Row]:
    pick = random.Random(7)
    made = []
    for _ in range(count):
        length = pick.randint(1, longest)
        types = [0] * (length // 2) + [1] * (length - length // 2) if pairs else []
        made.append(Row([pick.randrange(vocab) for _ in range(length)], types))
    return made


def gathered(batches: Any, count: int) -> Any:
    found: dict[int, Any] = {}
    for indices, values in batches:
        assert len(indices) == len(values)
        found |= dict(zip(indices, values, strict=True))
    assert sorted(found) == list(range(count))
    return torch.stack([found[n] for n in range(count)])


def padded(made: list[Row]) -> dict[str, Any]:
    longest = max(len(row.token_ids) for row in made)
    ids, mask, types = (torch.zeros(len(made), longest, dtype=torch.int64) for _ in range(3))
    for n, row in enumerate(made):
        length = len(row.token_ids)
        ids[n, :length], mask[n, :length] = torch.tensor(row.token_ids), 1
        if row.type_ids:
            types[n, :length] = torch.tensor(row.type_ids)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def folder_of(model: Any, folder: Path, **changes: Any) -> Path:
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def mean_pooled(hidden: Any, mask: Any) -> Any:
    pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(pooled, dim=1)


def test_vectors_equal_transformers_on_random_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    theirs = transformers.BertModel(transformers.BertConfig(**TINY, initializer_range=0.4)).eval()
    ours = Bert.load(folder_of(theirs, tmp_path))
    made = rows(40, 48)
    with torch.inference_mode():
        hidden = theirs(**padded(made)).last_hidden_state
    expected = mean_pooled(hidden, padded(made)["attention_mask"])
    found = gathered(ours.embed(made, budget=160), len(made))
    assert (found - expected).abs().max() < 1e-5
    assert expected.std() > 0.05  # else any answer would do

    cls = Bert.load(folder_of(theirs, tmp_path / "cls", pooling="cls"))
    first = torch.nn.functional.normalize(hidden[:, 0], dim=1)
    assert (gathered(cls.embed(made), len(made)) - first).abs().max() < 1e-5
    assert (first - expected).abs().max() > 0.05


@pytest.mark.parametrize("labels", [1, 3])
def test_scores_of_pairs_equal_transformers(tmp_path: Path, labels: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    config = transformers.BertConfig(**TINY, initializer_range=0.4, num_labels=labels)
    theirs = transformers.BertForSequenceClassification(config).eval()
    ours = Bert.load(folder_of(theirs, tmp_path))
    made = rows(30, 48, pairs=True)
    with torch.inference_mode():
        expected = theirs(**padded(made)).logits
    found = gathered(ours.classify(made, budget=100), len(made))
    assert found.shape == (30, labels)
    assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    swapped = [Row(row.token_ids, [1 - n for n in row.type_ids]) for row in made]
    assert (gathered(ours.classify(swapped), len(made)) - found).abs().max() > 1e-3  # the type ids matter


def test_a_row_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    ours = Bert.load(folder_of(transformers.BertModel(transformers.BertConfig(**TINY)).eval(), tmp_path))
    made = rows(25, 48)
    together = gathered(ours.embed(made), len(made))
    alone = torch.cat([vectors for row in made for _, vectors in ours.embed([row])])
    assert (together - alone).abs().max() < 1e-6
    sizes = [len(indices) * max(len(made[n].token_ids) for n in indices) for indices, _ in ours.embed(made, budget=100)]
    assert max(sizes) <= 100 and len(sizes) > 3  # memory is bounded by the budget, padding included


@pytest.mark.slow
def test_minilm_equals_transformers(stored: Callable[[str], Path]) -> None:
    transformers = pytest.importorskip("transformers")
    from node.runtime.tasks.texts import Texts

    folder = stored("minilm")
    ours = Bert.load(folder)
    assert ours.config.context_length == 256 and ours.config.pooling == "mean"
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    encoded = transformers.AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding=True, truncation=False, return_tensors="pt"
    )
    texts = Texts(folder, ours.config.context_length)
    made = [texts.row(text, "a text") for text in TEXTS]
    assert [list(row.token_ids) for row in made] == [
        ids[: int(mask.sum())].tolist() for ids, mask in zip(encoded.input_ids, encoded.attention_mask, strict=True)
    ]
    with torch.inference_mode():
        expected = mean_pooled(theirs(**encoded).last_hidden_state, encoded.attention_mask)
    found = gathered(ours.embed(made), len(made))
    assert (found - expected).abs().max() < 1e-5
    assert float(found[0] @ found[1]) > 0.7 > 0.2 > float(found[0] @ found[2])


def test_what_a_row_may_be(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = Bert.load(folder_of(transformers.BertModel(transformers.BertConfig(**TINY)), tmp_path))
    for bad in (Row([]), Row([1] * 49), Row([101]), Row([-1]), Row([1, 2], [0]), Row([1, 2], [0, 2])):
        with pytest.raises(InvalidSequence):
            list(ours.embed([Row([1]), bad]))
    with pytest.raises(UnsupportedModel, match="no classification head"):
        list(ours.classify([Row([1])]))


GOOD: dict[str, Any] = {
    "vocab_size": 10,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "relu"},
        {"position_embedding_type": "relative_key"},
        {"is_decoder": True},
        {"pooling": "max"},
        {"hidden_size": 9},
        {"hidden_size": 1 << 30},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": True},
        {"layer_norm_eps": "tiny"},
        {"max_seq_length": 17},
        {"architectures": ["BertForSequenceClassification"], "id2label": {}},
    ],
)
def test_configs_that_are_not_built_are_refused(change: dict[str, Any]) -> None:
    BertConfig.parse(GOOD)
    with pytest.raises(UnsupportedModel):
        BertConfig.parse(GOOD | change)


def test_weights_must_be_there_and_fit(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps(GOOD | {"model_type": "bert"}))
    shapes = BertConfig.parse(GOOD).shapes()
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors")
    assert Bert.load(tmp_path).weight_bytes == sum(4 * one.numel() for one in weights.values())
    name = "encoder.layer.0.output.dense.weight"
    save_file(weights | {name: torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="has shape"):
        Bert.load(tmp_path)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="lacks"):
        Bert.load(tmp_path)
