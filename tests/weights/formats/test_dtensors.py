"""Pickles of DTensors, as verl saves them: bit for bit the full state dict and verl's merge."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Shard

from loader import boot
from loader.errors import CheckpointError, FormatError, UnsupportedError
from loader.types import Kind
from loader.weights.formats.consolidation import consolidate
from loader.weights.formats.serving import serving_files
from loader.weights.inspect import find_checkpoints
from tests.origin import FaultyOrigin
from tests.test_boot import Job
from tests.weights.formats.conftest import assert_same, copy_case, found, names_of, tensors_of

ACTOR = "global_step_5/actor"
CASES = ["fsdp2", "replicated", "fsdp1"]


def reference(case: Path) -> dict[str, torch.Tensor]:
    full: dict[str, torch.Tensor] = load_file(case / "full.safetensors")
    if case.name == "replicated":
        assert full.pop("lm_head.weight").equal(full["model.embed_tokens.weight"])
    return full


def file_of(case: Path, rank: int) -> Path:
    (path,) = case.glob(f"rank-*/{ACTOR}/model_world_size_4_rank_{rank}.pt")
    return path


def merged_as_verl_merges(case: Path) -> dict[str, torch.Tensor]:
    """Return what its rule gives: shards of the first replica, cast, one behind the other."""
    states = [torch.load(file_of(case, rank), weights_only=False) for rank in range(4)]
    merged: dict[str, torch.Tensor] = {}
    for name, first in states[0].items():
        assert isinstance(first, DTensor)
        (placement,) = [p for p in first.placements if isinstance(p, Shard)]
        count = first.device_mesh.mesh.shape[-1]
        parts = [state[name]._local_tensor.bfloat16() for state in states[:count]]
        merged[name] = torch.cat(parts, dim=placement.dim)
    return merged


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_full_state_dict_and_to_verls_merge(
    verl: Path, case: str, tmp_path: Path
) -> None:
    checkpoint = found(verl / case)
    assert checkpoint.kind is Kind.DTENSOR
    assert checkpoint.path == verl / case / "rank-0" / ACTOR
    out = consolidate(checkpoint, tmp_path / "out")
    assert_same(tensors_of(out), reference(verl / case))
    assert (out / "tokenizer.json").exists()
    cast = consolidate(checkpoint, tmp_path / "cast", dtype="bfloat16")
    wanted = merged_as_verl_merges(verl / case)
    if case == "replicated":
        wanted.pop("lm_head.weight")
    assert_same(tensors_of(cast), wanted)


def test_what_serving_needs(verl: Path) -> None:
    needed = {Path(name).name for name in serving_files(names_of(verl / "fsdp2"))}
    assert "config.json" in needed
    assert sum(name.startswith("model_world") for name in needed) == 4
    assert not any(name.startswith(("optim", "extra_state")) for name in needed)


def test_a_rank_that_is_missing(verl: Path, tmp_path: Path) -> None:
    case = copy_case(verl / "fsdp2", tmp_path / "case")
    file_of(case, 3).unlink()
    with pytest.raises(CheckpointError, match="no rank's folder holds") as error:
        consolidate(found(case), tmp_path / "out")
    assert "no rank has the file of 3" in error.value.got
    assert not (tmp_path / "out").exists()


def test_a_replica_that_is_missing_is_not_needed(verl: Path, tmp_path: Path) -> None:
    case = copy_case(verl / "replicated", tmp_path / "case")
    for rank in (1, 2):
        file_of(case, rank).unlink()
    out = consolidate(found(case), tmp_path / "out")
    assert_same(tensors_of(out), reference(verl / "replicated"))


def test_files_of_another_run(verl: Path, tmp_path: Path) -> None:
    case = copy_case(verl / "fsdp2", tmp_path / "case")
    path = file_of(case, 1)
    shutil.copy(path, path.with_name("model_world_size_8_rank_7.pt"))
    with pytest.raises(CheckpointError, match="several sizes"):
        consolidate(found(case), tmp_path / "out")
    shutil.copy(file_of(verl / "fsdp2", 0), tmp_path / "other.pt")
    path.with_name("model_world_size_8_rank_7.pt").unlink()
    path.unlink()
    shutil.copy(tmp_path / "other.pt", path)  # a rank's file under another rank's name
    with pytest.raises(CheckpointError, match="no rank's folder holds"):
        consolidate(found(case), tmp_path / "out")


def test_a_tensor_that_is_no_state(verl: Path, tmp_path: Path) -> None:
    case = copy_case(verl / "fsdp2", tmp_path / "case")
    path = file_of(case, 1)
    path.unlink()
    torch.save([1], path)
    with pytest.raises(FormatError, match="not what its name says"):
        consolidate(found(case), tmp_path / "out")


def test_partial_sums_are_refused(verl: Path, tmp_path: Path) -> None:
    case = copy_case(verl / "fsdp2", tmp_path / "case")
    path = file_of(case, 0)
    content = path.read_bytes()
    path.unlink()
    shard = b"torch.distributed.tensor.placement_types\nShard\n"
    edit_pickle(path, content, shard, shard.replace(b"Shard", b"Partial"))
    with pytest.raises(UnsupportedError, match="cut in a way"):
        consolidate(found(case), tmp_path / "out")


def edit_pickle(path: Path, content: bytes, old: bytes, new: bytes) -> None:
    """Write the archive *content* to *path* with other bytes in its pickle."""
    with (
        zipfile.ZipFile(io.BytesIO(content)) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target,
    ):
        for info in source.infolist():
            data = source.read(info)
            target.writestr(
                info, data.replace(old, new) if info.filename.endswith(".pkl") else data
            )


def test_a_whole_model_beside_it_is_taken(verl: Path, tmp_path: Path) -> None:
    """verl's ``hf_model`` among what it saves."""
    case = copy_case(verl / "fsdp2", tmp_path / "case")
    beside = case / "rank-0" / ACTOR / "huggingface"
    shutil.copy(verl / "fsdp2/full.safetensors", beside / "model.safetensors")
    (checkpoint,) = find_checkpoints(case, names_of(case))
    assert (checkpoint.kind, checkpoint.path) == (Kind.FULL, beside)


def test_an_adapter_beside_its_shards_is_taken(verl: Path, tmp_path: Path) -> None:
    """Which verl's worker saves; where there is its config alone the shards give the tensors."""
    checkpoint = found(verl / "lora")
    assert (checkpoint.kind, checkpoint.path.name) == (Kind.ADAPTER, "lora_adapter")
    case = copy_case(verl / "lora", tmp_path / "case")
    adapter = case / "rank-0" / ACTOR / "lora_adapter"
    (adapter / "adapter_model.safetensors").unlink()
    out = consolidate(found(case), tmp_path / "out")
    merged = load_file(out / "adapter_model.safetensors")
    assert_same(merged, load_file(verl / "lora/full.safetensors"))
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="without its adapter_config"):
        consolidate(found(case), tmp_path / "without")


@pytest.mark.parametrize("only", [True, False])
def test_from_signed_urls(verl: Path, origin: FaultyOrigin, tmp_path: Path, only: bool) -> None:
    job = Job(origin, tmp_path)
    for rank in (0, 1):
        job.put(verl / f"fsdp2/rank-{rank}/global_step_5", "global_step_5", rank=rank)
    settings = job.settings(f"rank-*/{ACTOR}/", weights_only_fetch=only)
    ready = boot.prepare(settings)
    assert_same(tensors_of(ready.path), reference(verl / "fsdp2"))
    assert ready.provenance["kind"] == "dtensor"
    fetched = {path.name for path in job.root.rglob("*_rank_*.pt")}
    assert not fetched if only else len(fetched) == 12
