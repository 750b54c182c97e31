"""What comes along with merged weights: all that a server reads beside them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from loader.adapters.merge import WeightedAdapter, merge
from loader.stores.model_files import side_files
from loader.types import Kind
from loader.weights.inspect import find_checkpoints, open_checkpoint
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
