"""Hugging Face shards spread over ranks, as a job that saves on every node would upload them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loader.errors import CheckpointError, FormatError, UnsupportedError
from loader.types import Kind
from loader.weights.byte_files import LocalFile
from loader.weights.formats import slabs
from loader.weights.formats.consolidation import consolidate
from loader.weights.formats.rank_files import local_files
from loader.weights.formats.ranks import RankShardsSource
from tests.models import tiny_llama
from tests.weights.formats.conftest import assert_same, edit_config, found, tensors_of

INDEX = "model.safetensors.index.json"


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A model in shards, dealt out to two nodes; config on one, index on the other."""
    whole = tiny_llama(tmp_path / "whole", max_shard_size="300KB")
    shards = sorted(whole.glob("model-*.safetensors"))
    assert len(shards) > 3
    folders = [tmp_path / f"case/rank-{rank}/checkpoint-10" for rank in (0, 1)]
    for folder in folders:
        folder.mkdir(parents=True)
    for number, path in enumerate(shards):
        path.rename(folders[number % 2] / path.name)
    (whole / INDEX).rename(folders[1] / INDEX)
    for path in whole.iterdir():
        path.rename(folders[0] / path.name)
    return tmp_path / "case"


def wanted(case: Path) -> dict[str, torch.Tensor]:
    files = case.glob("rank-*/checkpoint-10/model-*.safetensors")
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("index", ["on another rank", "on none"])
def test_the_shards_of_two_nodes(case: Path, index: str, tmp_path: Path) -> None:
    if index == "on none":
        (case / "rank-1/checkpoint-10" / INDEX).unlink()
    checkpoint = found(case)
    assert checkpoint.kind is Kind.RANK_SHARDS
    out = consolidate(checkpoint, tmp_path / "out", max_shard_bytes=400_000)
    assert_same(tensors_of(out), wanted(case))
    assert json.loads((out / INDEX).read_text())["weight_map"].keys() == wanted(case).keys()
    assert (out / "tokenizer.json").is_file()


def test_the_parts_that_modules_speaks_of_come_along(case: Path, tmp_path: Path) -> None:
    """Without them vLLM pools otherwise, and leaves a projection out, without a word."""
    parts = {"modules.json": "[]", "1_Pooling/config.json": "{}", "2_Dense/config.json": "{1}"}
    for name, text in parts.items():
        path = case / "rank-0/checkpoint-10" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (case / "rank-0/checkpoint-10/trainer_state.json").write_text("{}")
    out = consolidate(found(case), tmp_path / "out")
    assert {name: (out / name).read_text() for name in parts} == parts
    assert not (out / "trainer_state.json").exists()


def test_plain_weights_are_not_called_quantised(case: Path, tmp_path: Path) -> None:
    """A job that trained what was dequantised may leave the base's word in its configs."""
    folder = case / "rank-0/checkpoint-10"
    about = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    edit_config(folder, quantization_config=about)
    fields = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(fields))
    out = consolidate(found(case), tmp_path / "out")
    assert_same(tensors_of(out), wanted(case))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not (out / "hf_quant_config.json").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_without_scales(case: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    for path in case.glob("rank-*/checkpoint-10/model-*.safetensors"):
        tensors = load_file(path)
        save_file({n: t.to(dtype) if "_proj" in n else t for n, t in tensors.items()}, path)
    with pytest.raises(UnsupportedError, match="quantised weights") as error:
        consolidate(found(case), tmp_path / "out")
    assert len(error.value.problems) == 14
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_named_by_its_tensors(case: Path, tmp_path: Path) -> None:
    path = sorted(case.glob("rank-1/checkpoint-10/model-*"))[0]
    lost = sorted(load_file(path))
    path.unlink()
    with pytest.raises(CheckpointError, match="no rank's folder holds") as error:
        consolidate(found(case), tmp_path / "out")
    assert sorted(error.value.problems) == [f"{name}: no rank has {path.name}" for name in lost]


def test_a_missing_shard_without_an_index(case: Path, tmp_path: Path) -> None:
    path = sorted(case.glob("rank-1/checkpoint-10/model-*"))[0]
    path.unlink()
    (case / "rank-1/checkpoint-10" / INDEX).unlink()
    with pytest.raises(CheckpointError, match="no rank's folder holds") as error:
        consolidate(found(case), tmp_path / "out")
    assert error.value.problems == (f"no rank has {path.name}",)


def test_a_shard_that_is_cut_short(case: Path, tmp_path: Path) -> None:
    path = sorted(case.glob("rank-1/checkpoint-10/model-*"))[0]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 10)
    with pytest.raises(FormatError, match="lies about its tensors") as error:
        consolidate(found(case), tmp_path / "out")
    assert path.name in error.value.where


def test_a_tensor_that_two_shards_hold(case: Path, tmp_path: Path) -> None:
    first, second = sorted(case.glob("rank-0/checkpoint-10/model-*"))[:2]
    second.write_bytes(first.read_bytes())
    (case / "rank-1/checkpoint-10" / INDEX).unlink()
    with pytest.raises(FormatError, match="stored twice") as error:
        consolidate(found(case), tmp_path / "out")
    assert f": again in {second.name}" in error.value.problems[0]


@pytest.mark.parametrize("block_bytes", [slabs.BLOCK_BYTES, 3000])
def test_pickled_shards_are_read_without_torch(
    case: Path, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader makes descriptions of tensors; strides of a transposed one are followed."""
    monkeypatch.setattr(slabs, "BLOCK_BYTES", block_bytes)
    everything = wanted(case)
    read_into, read = LocalFile.read_into, 0

    def counted(self: LocalFile, start: int, buffer: memoryview) -> None:
        nonlocal read
        read += len(buffer)
        read_into(self, start, buffer)

    monkeypatch.setattr(LocalFile, "read_into", counted)
    (case / "rank-1/checkpoint-10" / INDEX).unlink()
    for path in list(case.glob("rank-*/checkpoint-10/model-*")):
        name = path.name.replace("model", "pytorch_model").replace("safetensors", "bin")
        tensors = load_file(path)
        turned = {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in tensors.items()}
        torch.save(turned, path.with_name(name))
        path.unlink()
    out = consolidate(found(case), tmp_path / "out")
    assert_same(tensors_of(out), everything)
    # Each is read once, in however many slabs it is written; directories and pickles come on top.
    assert read < 1.1 * sum(tensor.nbytes for tensor in everything.values())


def test_counts_in_names_are_not_counted_to(tmp_path: Path) -> None:
    folder = tmp_path / "rank-0/c"
    folder.mkdir(parents=True)
    for number in range(200):
        (folder / f"model-00001-of-{999_999_000 + number}.safetensors").touch()
    with pytest.raises(CheckpointError, match="no rank's folder holds") as caught:
        RankShardsSource(local_files([folder]))
    assert caught.value.problems[0].endswith("00002-of-999999000.safetensors")
