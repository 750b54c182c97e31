"""torch.distributed.checkpoint: bit for bit what the framework's own way gives."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import GemmaConfig, LlamaForCausalLM

from loader.errors import CheckpointError, FormatError, UnsupportedError
from loader.types import Checkpoint, Kind
from loader.weights.formats.consolidation import consolidate
from loader.weights.inspect import find_checkpoints
from tests.weights.formats.conftest import assert_same, copy_case, found, tensors_of

MODELS = ["fsdp2", "fsdp1", "fsdp1-full", "hsdp-tp", "full", "fsdp2-bf16-tied"]
MODELS += ["torchtitan", "torchtune", "safetensors-form"]


@pytest.mark.parametrize("case", MODELS)
def test_equal_to_the_full_state_dict(fsdp: Path, case: str, tmp_path: Path) -> None:
    checkpoint = found(fsdp / case)
    assert checkpoint.kind is Kind.DCP
    out = consolidate(checkpoint, tmp_path / "out")
    wanted = load_file(fsdp / case / "full.safetensors")
    if case.endswith("tied"):
        assert wanted.pop("lm_head.weight").equal(wanted["model.embed_tokens.weight"])
    assert_same(tensors_of(out), wanted)
    assert (out / "tokenizer.json").exists()
    assert (out / "generation_config.json").exists()


def test_equal_to_dcp_to_torch_save(fsdp: Path, tmp_path: Path) -> None:
    """The shards of both nodes in one folder, as torch wants them."""
    together = tmp_path / "together"
    together.mkdir()
    for path in (fsdp / "fsdp2").glob("rank-*/checkpoint-10/*"):
        (together / path.name).symlink_to(path)
    dcp_to_torch_save(together, tmp_path / "whole.pt")
    wanted = torch.load(tmp_path / "whole.pt", weights_only=True)["model"]
    out = consolidate(found(fsdp / "fsdp2"), tmp_path / "out")
    assert_same(tensors_of(out), dict(wanted))


def test_transformers_answers_alike(fsdp: Path, tmp_path: Path) -> None:
    for case in ("fsdp2", "fsdp2-bf16-tied"):
        out = consolidate(found(fsdp / case), tmp_path / case, max_shard_bytes=300_000)
        model: Any = LlamaForCausalLM.from_pretrained(out, dtype="auto")
        wanted = load_file(fsdp / case / "full.safetensors")
        state = model.state_dict()
        assert_same({name: state[name] for name in wanted}, wanted)
        assert len(list(out.glob("model-*.safetensors"))) > 1


def test_the_trainers_own_checkpoint(trainer: Path, base: Path, tmp_path: Path) -> None:
    """Saved sharded, the Trainer leaves no config: it comes from the base model."""
    checkpoint = found(trainer)
    with pytest.raises(CheckpointError, match=r"no rank has the config.json"):
        consolidate(checkpoint, tmp_path / "out")
    out = consolidate(checkpoint, tmp_path / "out", base=base)
    assert_same(tensors_of(out), load_file(trainer / "full.safetensors"))
    assert (out / "tokenizer.json").exists()


def test_accelerates_own_save_state(trainer: Path, base: Path, tmp_path: Path) -> None:
    checkpoint = found(trainer.parent / "accelerate")
    assert (trainer.parent / "accelerate/rank-1/checkpoint-2/pytorch_model_fsdp_0").is_dir()
    assert checkpoint.kind is Kind.DCP
    out = consolidate(checkpoint, tmp_path / "out", base=base)
    assert_same(tensors_of(out), load_file(trainer / "full.safetensors"))


def test_accelerates_full_state_dict(trainer: Path, base: Path, tmp_path: Path) -> None:
    """A pickle on the first rank; the others have nothing."""
    checkpoint = found(trainer.parent / "accelerate-full")
    assert checkpoint.kind is Kind.RANK_SHARDS
    out = consolidate(checkpoint, tmp_path / "out", base=base)
    assert_same(tensors_of(out), load_file(trainer / "full.safetensors"))


@pytest.mark.parametrize("case", ["torchtitan", "torchtune"])
def test_a_trainers_own_layout_is_cast_once(fsdp: Path, case: str, tmp_path: Path) -> None:
    out = consolidate(found(fsdp / case), tmp_path / "out", dtype="bfloat16")
    full = load_file(fsdp / case / "full.safetensors")
    assert_same(tensors_of(out), {k: v.to(torch.bfloat16) for k, v in full.items()})


def test_a_trainers_own_layout_that_is_not_known(fsdp: Path, tmp_path: Path) -> None:
    case = copy_case(fsdp / "torchtune", tmp_path / "case")
    home = case / "rank-0/checkpoint-10"
    (home / "config.json").unlink()
    GemmaConfig(num_hidden_layers=1, architectures=["GemmaForCausalLM"]).save_pretrained(home)
    with pytest.raises(UnsupportedError, match="whose layout is not known") as error:
        consolidate(found(case), tmp_path / "out")
    assert error.value.got == "gemma"


def test_config_on_another_rank(fsdp: Path, tmp_path: Path) -> None:
    case = fsdp / "fsdp2-bf16-tied"
    assert not (case / "rank-0/checkpoint-10/config.json").exists()
    out = consolidate(found(case), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("case", ["fsdp2", "hsdp-tp"])
def test_cast_once(fsdp: Path, case: str, tmp_path: Path) -> None:
    out = consolidate(found(fsdp / case), tmp_path / "out", dtype="bfloat16")
    full = load_file(fsdp / case / "full.safetensors")
    assert_same(tensors_of(out), {k: v.to(torch.bfloat16) for k, v in full.items()})
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_dcps_safetensors_storage(fsdp: Path, tmp_path: Path) -> None:
    case = fsdp / "hf-storage"
    folders = [str(case / f"rank-{node}/checkpoint-10") for node in (0, 1)]
    checkpoint = found(case)
    assert checkpoint.kind is Kind.DCP
    assert checkpoint.detail["folders"] == folders
    out = consolidate(checkpoint, tmp_path / "out")
    assert_same(tensors_of(out), load_file(case / "full.safetensors"))
    checkpoint = Checkpoint(Kind.DCP, Path(folders[0]), {"folders": folders[1:]})
    with pytest.raises(CheckpointError, match="no rank's folder") as error:
        consolidate(checkpoint, tmp_path / "out2")
    assert any("model.norm.weight: 64 of 128" in p for p in error.value.problems)
    checkpoint = Checkpoint(Kind.DCP, Path(folders[0]), {"folders": folders[:1]})
    with pytest.raises(CheckpointError, match="not the model") as error:
        consolidate(checkpoint, tmp_path / "out2")
    assert any("another shape: model.norm.weight" in p for p in error.value.problems)


@pytest.mark.parametrize("case", ["lora", "lora-peft-names"])
def test_lora_becomes_an_adapter(fsdp: Path, case: str, tmp_path: Path) -> None:
    out = consolidate(found(fsdp / case), tmp_path / "out")
    assert_same(tensors_of(out), load_file(fsdp / case / "full.safetensors"))
    (adapter,) = find_checkpoints(out)
    assert adapter.kind is Kind.ADAPTER
    assert adapter.detail["rank"] == 4


def test_lora_without_its_config(fsdp: Path, tmp_path: Path) -> None:
    case = copy_case(fsdp / "lora", tmp_path / "case")
    (case / "rank-0/checkpoint-10/adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="without its adapter_config"):
        consolidate(found(case), tmp_path / "out")


def test_a_rank_that_is_missing(fsdp: Path, tmp_path: Path) -> None:
    case = copy_case(fsdp / "fsdp2", tmp_path / "case")
    for path in (case / "rank-1/checkpoint-10").glob("*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no rank's folder holds") as error:
        consolidate(found(case), tmp_path / "out")
    problems = error.value.problems
    assert "model.model.embed_tokens.weight [194:291, 0:128]: no rank has __2_0.distcp" in problems
    assert len(problems) == 42  # 21 tensors, two ranks; the optimizer's are not asked for
    assert not (tmp_path / "out").exists()


def test_a_shard_that_is_cut_short(fsdp: Path, tmp_path: Path) -> None:
    case = copy_case(fsdp / "fsdp1", tmp_path / "case")
    shard = case / "rank-1/checkpoint-10/pytorch_model_fsdp_0/__3_0.distcp"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="no rank's folder holds") as error:
        consolidate(found(case), tmp_path / "out")
    assert error.value.problems == (
        "model.lm_head.weight [291:387, 0:128]: __3_0.distcp has 426972 bytes, 426973 are needed",
    )


def test_metadata_on_no_rank(fsdp: Path, tmp_path: Path) -> None:
    case = copy_case(fsdp / "fsdp2", tmp_path / "case")
    (case / "rank-0/checkpoint-10/.metadata").unlink()
    with pytest.raises(FormatError, match=r"no rank has \.metadata"):
        consolidate(found(case), tmp_path / "out")


def test_a_chunk_of_another_checkpoint(fsdp: Path, tmp_path: Path) -> None:
    case = copy_case(fsdp / "fsdp2", tmp_path / "case")
    shard = case / "rank-0/checkpoint-10/__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[:64] = b"x" * 64
    shard.write_bytes(content)
    with pytest.raises(FormatError):
        consolidate(found(case), tmp_path / "out")


def test_another_models_config(fsdp: Path, tmp_path: Path) -> None:
    case = copy_case(fsdp / "fsdp2", tmp_path / "case")
    path = case / "rank-0/checkpoint-10/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": 3, "intermediate_size": 255}))
    with pytest.raises(CheckpointError, match="not the model") as error:
        consolidate(found(case), tmp_path / "out")
    kinds = [p.partition(":")[0] for p in error.value.problems]
    assert (kinds.count("missing"), kinds.count("another shape")) == (9, 6)
    path.write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError) as error:
        consolidate(found(case), tmp_path / "out")
    assert len(error.value.problems) == 9
    assert error.value.problems[0].startswith("unexpected: model.model.layers.1.")


def test_a_config_of_no_model(fsdp: Path, tmp_path: Path) -> None:
    case = copy_case(fsdp / "fsdp2", tmp_path / "case")
    path = case / "rank-0/checkpoint-10/config.json"
    path.write_text('{"model_type": "nothing-like-this"}')
    with pytest.raises(UnsupportedError, match="transformers makes no model"):
        consolidate(found(case), tmp_path / "out")


def test_tied_weights_that_differ(fsdp: Path, tmp_path: Path) -> None:
    case = copy_case(fsdp / "fsdp2", tmp_path / "case")
    path = case / "rank-0/checkpoint-10/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match="tied weights"):
        consolidate(found(case), tmp_path / "out")


def test_a_hostile_metadata(fsdp: Path, tmp_path: Path) -> None:
    case = copy_case(fsdp / "fsdp2", tmp_path / "case")
    path = case / "rank-0/checkpoint-10/.metadata"
    path.write_bytes(pickle.dumps({"state_dict_metadata": print}))
    with pytest.raises(UnsupportedError, match="pickle") as error:
        consolidate(found(case), tmp_path / "out")
    assert error.value.got == "'builtins.print'"


def test_progress_counts_every_byte(fsdp: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    consolidate(
        found(fsdp / "fsdp2"), tmp_path / "out", on_progress=lambda *counts: seen.append(counts)
    )
    total = sum(t.nbytes for t in load_file(fsdp / "fsdp2/full.safetensors").values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_nodes_that_hold_other_bytes_under_one_name(fsdp: Path, name: str, tmp_path: Path) -> None:
    """A copy on the other node is taken for one; bytes of another run are not, size or no size."""
    case = copy_case(fsdp / "fsdp2", tmp_path / "case")
    first, second = (case / f"rank-{node}/checkpoint-10/{name}" for node in (0, 1))
    shutil.copy(first, second)
    out = consolidate(found(case), tmp_path / "out")
    assert_same(tensors_of(out), load_file(fsdp / "fsdp2/full.safetensors"))
    second.write_bytes(first.read_bytes()[:-1] + b"\x01")
    with pytest.raises(FormatError, match="under one name") as error:
        consolidate(found(case), tmp_path / "other")
    assert len(error.value.problems) == 2
