"""No weights twice, none of other frameworks."""

from __future__ import annotations

import pytest

from loader.stores.model_files import find_index, missing_files, weight_files
from loader.weights.side_files import side_files

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin", "original/model.safetensors"], 1),
        (["model.safetensors", "model.fp32-00001-of-00002.safetensors"], 1),
        ([*SHARDS, "model.safetensors.index.json", "consolidated.safetensors"], 2),
        (["weights.safetensors", "pytorch_model.bin"], 1),
        (["pytorch_model.bin", "training_args.bin"], 0),
        (["onnx/model.safetensors", "tf_model.h5", "model.gguf"], 0),
    ],
)
def test_weights_once(names: list[str], expected: int) -> None:
    found = weight_files(names)
    assert len(found) == expected
    assert not {"consolidated.safetensors", "pytorch_model.bin"} & set(found)


def test_pickles_where_there_is_nothing_else() -> None:
    names = [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        "optimizer.bin",
    ]
    assert weight_files(names, allow_pickle=True) == tuple(names[:2])
    assert weight_files(names) == ()


def test_what_stands_beside_the_weights() -> None:
    names = ["config.json", "tokenizer.model", "modeling_x.py", "additional_chat_templates/a.jinja"]
    assert side_files([*names, "original/params.json", "README.md", "x.safetensors"]) == tuple(
        sorted(names)
    )


INDEX = "model.safetensors.index.json"


def test_what_an_index_names() -> None:
    names = [*SHARDS, INDEX, "model-extra.safetensors", "consolidated.safetensors"]
    assert find_index(names) == INDEX
    indexed = [*SHARDS, "model-extra.safetensors"]
    assert weight_files(names, indexed=indexed) == tuple(sorted(indexed))
    assert missing_files([*indexed, "model-more.safetensors"], names) == ("model-more.safetensors",)
    assert weight_files([*names, "model.safetensors"], indexed=indexed) == ("model.safetensors",)
    pickled = ["pytorch_model.bin.index.json", "a.bin"]
    assert (find_index(pickled), find_index(pickled, allow_pickle=True)) == (None, pickled[0])


def test_what_numbers_count_without_an_index() -> None:
    assert missing_files(SHARDS, SHARDS) == ()
    assert missing_files(SHARDS[:1], SHARDS[:1]) == (SHARDS[1],)
    from_zero = ["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"]
    assert missing_files(from_zero, from_zero) == ()


def test_counts_in_names_are_not_counted_to() -> None:
    names = [f"model-00001-of-{999_999_000 + number}.safetensors" for number in range(200)]
    names += [f"model-00001-of-{'9' * 5000}.safetensors"]
    assert len(missing_files(names, names)) <= 100_000
    assert "model-00002-of-999999000.safetensors" in missing_files(names, names)
