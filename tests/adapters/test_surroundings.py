"""What comes along with merged weights: all that a server reads beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loader.adapters.merge import WeightedAdapter, merge
from loader.adapters.surroundings import has_tokenizer
from loader.errors import FormatError
from loader.types import Kind
from loader.weights.inspect import find_checkpoints, open_checkpoint
from loader.weights.side_files import side_files
from tests.models import tiny_llama, train_or_draw_lora

MODULES = {
    "modules.json": [{"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}],
    "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
    "2_Dense/config.json": {"in_features": 128, "out_features": 8},
    "sentence_bert_config.json": {"max_seq_length": 64},
}
WEIGHTS = "2_Dense/model.safetensors"


def sentence_model(folder: Path) -> Path:
    """A Llama with what sentence-transformers puts beside it."""
    tiny_llama(folder)
    for name, content in MODULES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    save_file({"linear.weight": torch.ones(8, 128)}, folder / WEIGHTS)
    for name in ("README.md", "1_Pooling/README.md", "optimizer.pt", "onnx/model.onnx"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no part of it")
    return folder


def test_how_a_model_pools_comes_along(tmp_path: Path) -> None:
    base = sentence_model(tmp_path / "base")
    adapter = train_or_draw_lora(base, tmp_path / "adapter")
    out = merge(base, [WeightedAdapter(adapter)], tmp_path / "out").path
    for name in (*MODULES, WEIGHTS):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert not {name for name in names if name.endswith((".md", ".pt", ".onnx"))}
    assert "model.safetensors" in names


def test_the_same_is_fetched(tmp_path: Path) -> None:
    base = sentence_model(tmp_path / "base")
    names = [path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()]
    assert {*MODULES, WEIGHTS} <= set(side_files(names))
    assert not {n for n in side_files(names) if n.endswith((".md", ".pt", ".onnx"))}
    pickled = [*MODULES, "2_Dense/pytorch_model.bin"]
    assert "2_Dense/pytorch_model.bin" in side_files(pickled)
    assert "2_Dense/pytorch_model.bin" not in side_files([*pickled, WEIGHTS])
    assert side_files(["1_Pooling/config.json", "onnx/config.json", "config.json"]) == (
        "config.json",
    )


def test_its_parts_are_no_checkpoints(tmp_path: Path) -> None:
    base = sentence_model(tmp_path / "base")
    assert [c.path for c in find_checkpoints(base)] == [base]
    assert open_checkpoint(base).kind is Kind.FULL


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_not_left_out_without_a_word(
    name: str, put: Callable[[Path], None], tmp_path: Path
) -> None:
    base = tiny_llama(tmp_path / "base")
    lora = train_or_draw_lora(base, tmp_path / "lora")
    for folder in (base, lora):
        if folder is lora and name == "generation_config.json":
            continue  # no part of an adapter
        kept = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).unlink(missing_ok=True)
        put(folder / name)
        with pytest.raises(FormatError, match="what has a file's name and is none") as caught:
            merge(base, [WeightedAdapter(lora)], tmp_path / "merged")
        assert str(folder / name) in caught.value.problems[0]
        assert not (tmp_path / "merged").exists()
        (folder / name).unlink()
        if kept is not None:
            (folder / name).write_bytes(kept)


def test_a_tokenizer_that_is_no_file_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(FormatError):
        has_tokenizer(tmp_path)
