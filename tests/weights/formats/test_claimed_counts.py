"""Counts that a file's name or its pickle claims: refused before anybody counts so far."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from loader.errors import CheckpointError, FormatError, LoaderError, UnsupportedError
from loader.weights.byte_files import LocalFile
from loader.weights.formats import megatron
from loader.weights.formats.consolidation import consolidate
from loader.weights.formats.partitions import Run, cut_each
from loader.weights.formats.rank_files import local_files
from loader.weights.formats.views import Heads
from loader.weights.formats.zero import ZeroSource
from loader.weights.inspect import find_checkpoints

TAG = "global_step1"
MANY = 400_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "c"
    (folder / TAG).mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def consolidate_here(folder: Path) -> None:
    (checkpoint,) = find_checkpoints(folder.parent)
    consolidate(checkpoint, folder.parent / "out")


@pytest.mark.parametrize("count", [f"{MANY}", "9" * 200])
def test_ranks_in_the_name_of_a_dtensor_file(folder: Path, count: str) -> None:
    torch.save({"w": torch.zeros(2)}, folder / f"model_world_size_{count}_rank_0.pt")
    with pytest.raises(CheckpointError, match="more ranks than any job has"):
        consolidate_here(folder)


@pytest.mark.parametrize("count", [f"{MANY}", "9" * 200])
@pytest.mark.parametrize("kind", ["model_states", "optim_states"])
def test_ranks_in_the_name_of_a_zero_file(folder: Path, kind: str, count: str) -> None:
    torch.save({"module": {}}, folder / TAG / "mp_rank_00_model_states.pt")
    torch.save({}, folder / TAG / f"zero_pp_rank_{count}_mp_rank_00_{kind}.pt")
    with pytest.raises(CheckpointError, match="several runs") as caught:
        consolidate_here(folder)
    assert "no job has a rank" in str(caught.value)


def test_a_tensor_parallel_rank_in_the_name_of_a_zero_file(folder: Path) -> None:
    for rank in ("00", "9" * 200):
        torch.save({"module": {}}, folder / TAG / f"mp_rank_{rank}_model_states.pt")
    with pytest.raises(UnsupportedError):
        consolidate_here(folder)


@pytest.mark.parametrize("count", [MANY, 1 << 70, 65_536])
def test_partitions_that_a_pickle_claims(folder: Path, count: int) -> None:
    states = {
        "module": {"w": torch.zeros(0)},
        "param_shapes": [{"w": torch.Size([4])}],
        "dp_world_size": count,
    }
    torch.save(states, folder / TAG / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    state = {"zero_stage": 3, "partition_count": count, "fp32_flat_groups": [torch.zeros(4)]}
    path = folder / TAG / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": state}, path)
    source = ZeroSource(local_files([folder]), TAG)
    with pytest.raises(CheckpointError):
        source.open(["w"], None)


def test_ranks_of_frozen_parameters_that_a_pickle_claims(folder: Path) -> None:
    """One file of them says that there are 65,536; a problem each for 3,000 tensors is too many."""
    names = [f"w{number}" for number in range(3000)]
    states = {
        "module": {name: torch.zeros(0) for name in names},
        "param_shapes": [],
        "dp_world_size": 65_536,
        "frozen_param_shapes": {name: torch.Size([65_536]) for name in names},
        "frozen_param_fragments": {name: torch.zeros(1) for name in names},
    }
    torch.save(states, folder / TAG / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    source = ZeroSource(local_files([folder]), TAG)
    with pytest.raises(CheckpointError) as caught:
        source.open(names, None)
    assert "1 of them are here" in str(caught.value)


def test_parameters_of_fewer_elements_than_ranks_are_not_looked_for_on_all_of_them() -> None:
    shapes = {f"w{number}": (1,) for number in range(20_000)}
    runs = cut_each(shapes, [len(shapes)], 60_000)
    assert runs["w7"] == [Run(0, 0, 7, 1, 0)]
    assert sum(map(len, runs.values())) == len(shapes)


@pytest.mark.parametrize("layer", ["9" * 7, "9" * 5000])
def test_layers_in_a_tensor_s_name(layer: str) -> None:
    with pytest.raises(UnsupportedError):
        megatron.find_views(
            {f"decoder.layers.{layer}.self_attention.linear_proj.weight": (4, 4)},
            Heads(2, 2, 2, 8),
            "here",
        )


def test_layers_that_a_stack_claims() -> None:
    shape = (1 << 40, 4, 4)
    with pytest.raises(UnsupportedError):
        megatron.find_views(
            {"decoder.layers.self_attention.linear_proj.weight": shape}, Heads(2, 2, 2, 8), "here"
        )


def test_training_arguments_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "_MAX_CONFIG_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "common.pt", "w") as archive:
        archive.writestr("common/data.pkl", pickle.dumps(["x" * 2000]))
    with pytest.raises(FormatError, match="too large"):
        megatron.refuse_other_models(local_files([tmp_path]), "llama", "here")


@pytest.mark.parametrize("text", ["-1", "1" * 5000, "0x10", "\uff11" * 7])
def test_numbers_in_pickles_of_text(text: str, tmp_path: Path) -> None:
    from loader.weights.formats.archive import Archive

    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"I" + text.encode() + b"\n.")
    try:
        value = Archive(LocalFile(path)).value
    except LoaderError:
        return
    assert isinstance(value, int)
