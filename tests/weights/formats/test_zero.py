"""DeepSpeed ZeRO: bit for bit what zero_to_fp32 gives, cast once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from loader import boot
from loader.errors import CheckpointError, FormatError, UnsupportedError
from loader.types import Checkpoint, Kind
from loader.weights.byte_files import LocalFile
from loader.weights.formats.consolidation import consolidate
from loader.weights.inspect import find_checkpoints, open_checkpoint
from tests.origin import FaultyOrigin, write_listing
from tests.stores.hub import Hub
from tests.weights.formats.conftest import assert_same, copy_case, found, tensors_of

TRAINED = {
    "zero1-bf16": torch.bfloat16,
    "zero2-fp16": torch.float16,
    "zero2-tied": torch.bfloat16,
    "zero2-frozen": torch.bfloat16,
    "zero3-bf16": torch.bfloat16,
    "zero3-fp16": torch.float16,
    "zero3-tied": torch.bfloat16,
    "zero3-frozen": torch.bfloat16,
}


def reference(case: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return what zero_to_fp32 made, cast once; of tied tensors the one that is kept."""
    full = load_file(case / "full.safetensors")
    if case.name.endswith("tied"):
        assert full.pop("lm_head.weight").equal(full["model.embed_tokens.weight"])
    return {name: tensor.to(dtype) for name, tensor in full.items()}


@pytest.mark.parametrize("case", TRAINED)
def test_as_trained(zero: Path, case: str, tmp_path: Path) -> None:
    checkpoint = found(zero / case)
    assert checkpoint.kind is Kind.ZERO
    out = consolidate(checkpoint, tmp_path / "out")
    assert_same(tensors_of(out), reference(zero / case, TRAINED[case]))
    assert (out / "tokenizer.json").exists()


@pytest.mark.parametrize("case", TRAINED)
def test_from_the_float32_partitions(zero: Path, case: str, tmp_path: Path) -> None:
    """Asked for more than was trained in, the partitions give it, whatever the stage."""
    out = consolidate(found(zero / case), tmp_path / "out", dtype="float32")
    assert_same(tensors_of(out), reference(zero / case, torch.float32))


def test_transformers_answers_alike(zero: Path, tmp_path: Path) -> None:
    case = zero / "zero3-tied"
    out = consolidate(found(case), tmp_path / "out")
    model: Any = LlamaForCausalLM.from_pretrained(out, dtype="auto")
    state = model.state_dict()
    wanted = reference(case, torch.bfloat16)
    assert_same({name: state[name] for name in wanted}, wanted)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_universal_format(zero: Path, dtype: str | None, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(zero / "universal-made/checkpoint-10")
    assert checkpoint.detail["tag"] == "global_step10_universal"
    out = consolidate(checkpoint, tmp_path / "out", dtype=dtype)
    kept = torch.float32 if dtype else torch.bfloat16
    assert_same(tensors_of(out), reference(zero / "universal", kept))


def test_a_universal_tensor_that_is_missing(zero: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-10"
    shutil.copytree(zero / "universal-made/checkpoint-10", folder)
    shutil.rmtree(folder / "global_step10_universal/zero/model.norm.weight")
    with pytest.raises(CheckpointError, match="no rank's folder") as error:
        consolidate(open_checkpoint(folder), tmp_path / "out", dtype="float32")
    assert error.value.problems == (
        "model.norm.weight: no rank has zero/model.norm.weight/fp32.pt",
    )


def test_lora_becomes_an_adapter(zero: Path, tmp_path: Path) -> None:
    case = zero / "zero3-lora"
    out = consolidate(found(case), tmp_path / "out")
    full = load_file(case / "full.safetensors")
    wanted = {k.replace(".default.", "."): v.to(torch.bfloat16) for k, v in full.items()}
    assert_same(tensors_of(out), wanted)
    (adapter,) = find_checkpoints(out)
    assert adapter.kind is Kind.ADAPTER


def test_only_the_float32_partition_is_read(
    zero: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the optimizer files a third, and a few kilobytes of directories and pickles."""
    read: dict[str, int] = {}
    read_into = LocalFile.read_into

    def counted(self: LocalFile, start: int, buffer: memoryview) -> None:
        read[self.path.name] = read.get(self.path.name, 0) + len(buffer)
        read_into(self, start, buffer)

    monkeypatch.setattr(LocalFile, "read_into", counted)
    consolidate(found(zero / "zero3-bf16"), tmp_path / "three")
    full = sum(t.nbytes for t in load_file(zero / "zero3-bf16/full.safetensors").values())
    optim = sum(count for name, count in read.items() if "optim" in name)
    assert full <= optim < full + 300_000
    read.clear()
    consolidate(found(zero / "zero2-fp16"), tmp_path / "two")
    assert not [name for name in read if "optim" in name]


@pytest.mark.parametrize("case", ["zero2-fp16", "zero3-bf16", "zero3-frozen"])
def test_a_rank_that_is_missing(zero: Path, case: str, tmp_path: Path) -> None:
    copy = copy_case(zero / case, tmp_path / "case")
    shutil.rmtree(copy / "rank-1")
    with pytest.raises(CheckpointError, match="no rank's folder holds") as error:
        consolidate(found(copy), tmp_path / "out", dtype="float32")
    problems = "\n".join(error.value.problems)
    last = "model.norm.weight" if case != "zero2-fp16" else "lm_head.weight"
    assert f"{last} elements [" in problems
    assert "no rank has …zero_pp_rank_1_mp_rank_00_optim_states.pt" in problems
    if case == "zero3-frozen":
        frozen = "model.embed_tokens.weight elements [24768:49536]: "
        assert f"{frozen}no rank has …zero_pp_rank_1_mp_rank_00_model_states.pt" in problems
    assert not (tmp_path / "out").exists()


def test_stages_that_keep_the_model_whole_need_no_optimizer_files(
    zero: Path, tmp_path: Path
) -> None:
    copy = copy_case(zero / "zero1-bf16", tmp_path / "case")
    for path in copy.glob("rank-*/checkpoint-10/global_step10/*optim*"):
        path.unlink()
    out = consolidate(found(copy), tmp_path / "out")
    assert_same(tensors_of(out), reference(zero / "zero1-bf16", torch.bfloat16))


def test_a_partition_that_is_cut_short(zero: Path, tmp_path: Path) -> None:
    copy = copy_case(zero / "zero3-bf16", tmp_path / "case")
    (path,) = copy.glob("rank-1/checkpoint-10/global_step10/*optim*")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="no rank's folder holds") as error:
        consolidate(found(copy), tmp_path / "out")
    assert len(error.value.problems) == 21
    assert "cannot be read" in error.value.problems[0]


def test_model_states_on_no_rank(zero: Path, tmp_path: Path) -> None:
    copy = copy_case(zero / "zero2-fp16", tmp_path / "case")
    (copy / "rank-0/checkpoint-10/global_step10/mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="model states"):
        consolidate(found(copy), tmp_path / "out")


@pytest.mark.parametrize("name", ["mp_rank_01_model_states.pt", "layer_01-model_states.pt"])
def test_model_parallelism_is_refused_by_name(zero: Path, name: str, tmp_path: Path) -> None:
    copy = copy_case(zero / "zero2-fp16", tmp_path / "case")
    folder = copy / "rank-0/checkpoint-10/global_step10"
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / name)
    with pytest.raises(UnsupportedError, match="Megatron") as error:
        consolidate(found(copy), tmp_path / "out")
    assert "layer_01" in error.value.got or "[0, 1]" in error.value.got


def test_a_file_of_something_else(zero: Path, tmp_path: Path) -> None:
    copy = copy_case(zero / "zero2-fp16", tmp_path / "case")
    path = copy / "rank-0/checkpoint-10/global_step10/mp_rank_00_model_states.pt"
    path.unlink()
    torch.save({"module": [1, 2]}, path)
    with pytest.raises(FormatError, match="not what its name says"):
        consolidate(found(copy), tmp_path / "out")


def test_the_latest_step_is_taken(zero: Path, tmp_path: Path) -> None:
    copy = copy_case(zero / "zero2-fp16", tmp_path / "case")
    for rank in (0, 1):
        folder = copy / f"rank-{rank}/checkpoint-10"
        shutil.copytree(folder / "global_step10", folder / "global_step5")
    assert found(copy).detail["tag"] == "global_step10"
    (copy / "rank-0/checkpoint-10/latest").write_text("global_step5")
    assert found(copy).detail["tag"] == "global_step5"


def test_no_tag_in_the_detail_is_an_error(zero: Path, tmp_path: Path) -> None:
    case = zero / "zero2-fp16/rank-0/checkpoint-10"
    with pytest.raises(CheckpointError, match="model states"):
        consolidate(Checkpoint(Kind.ZERO, case, {}), tmp_path / "out")


def optimizer_file(case: Path, rank: int) -> Path:
    (path,) = case.glob(f"rank-{rank}/checkpoint-10/global_step10/*optim*")
    return path


def edit_states(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    states = torch.load(path, weights_only=False)
    change(states["optimizer_state_dict"])
    path.unlink()
    torch.save(states, path)


def add_a_third_rank(case: Path) -> None:
    path = optimizer_file(case, 1)
    shutil.copy(path, path.with_name(path.name.replace("rank_1", "rank_2")))


def add_another_dtype(case: Path) -> None:
    path = optimizer_file(case, 1)
    name = path.name.removeprefix("bf16_")
    shutil.copy(path, path.with_name(name if name != path.name else f"bf16_{name}"))


def count_three_partitions(case: Path) -> None:
    for rank in (0, 1):
        edit_states(
            optimizer_file(case, rank),
            lambda state: state.update(
                partition_count=[3] * len(state["partition_count"])
                if isinstance(state["partition_count"], list)
                else 3
            ),
        )


def shorten_groups(case: Path) -> None:
    for rank in (0, 1):
        edit_states(optimizer_file(case, rank), shorten)


def shorten(state: dict[str, Any]) -> None:
    name = "fp32_flat_groups" if "fp32_flat_groups" in state else "single_partition_of_fp32_groups"
    state[name] = [*state[name][:-1], state[name][-1][:-8].clone()]


@pytest.mark.parametrize(
    "damage", [add_a_third_rank, add_another_dtype, count_three_partitions, shorten_groups]
)
@pytest.mark.parametrize("case", ["zero2-fp16", "zero3-bf16", "zero3-frozen"])
def test_files_of_several_runs_are_refused_as_deepspeed_refuses(
    zero: Path, case: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    copy = copy_case(zero / case, tmp_path / "case")
    damage(copy)
    together = tmp_path / "together"
    for folder in copy.glob("rank-*/checkpoint-10"):
        shutil.copytree(folder, together, dirs_exist_ok=True)
    with pytest.raises((ValueError, RuntimeError)):
        get_fp32_state_dict_from_zero_checkpoint(str(together), tag="global_step10")
    with pytest.raises(CheckpointError) as error:
        consolidate(found(copy), tmp_path / "out", dtype="float32")
    assert error.value.problems
    assert not (tmp_path / "out").exists()


def test_one_rank_of_another_run_is_refused(zero: Path, tmp_path: Path) -> None:
    """What DeepSpeed itself does not look at: the group sizes of other ranks than the first."""
    copy = copy_case(zero / "zero3-bf16", tmp_path / "case")
    edit_states(optimizer_file(copy, 1), shorten)
    with pytest.raises(CheckpointError, match="several runs") as error:
        consolidate(found(copy), tmp_path / "out")
    (problem,) = error.value.problems
    assert "rank_1_mp_rank_00_optim" in problem


def test_a_frozen_part_of_another_run_is_refused(zero: Path, tmp_path: Path) -> None:
    copy = copy_case(zero / "zero3-frozen", tmp_path / "case")
    path = copy / "rank-1/checkpoint-10/global_step10/zero_pp_rank_1_mp_rank_00_model_states.pt"
    states = torch.load(path, weights_only=False)
    parts = states["frozen_param_fragments"]
    parts |= {name: part[:-1].clone() for name, part in parts.items()}
    path.unlink()
    torch.save(states, path)
    with pytest.raises(FormatError, match="frozen parameter"):
        consolidate(found(copy), tmp_path / "out")


@pytest.mark.parametrize("case", ["zero2-without", "zero3-without"])
def test_frozen_parameters_that_were_not_saved_come_from_the_base(
    zero: Path, base: Path, case: str, publish: Any, tmp_path: Path
) -> None:
    name = "model.embed_tokens.weight"
    frozen = load_file(base / "model.safetensors")[name].to(torch.bfloat16)
    wanted = reference(zero / case, torch.bfloat16)
    assert name not in wanted
    out = consolidate(found(zero / case), tmp_path / "out", base=base)
    assert_same(tensors_of(out), wanted | {name: frozen})
    with pytest.raises(CheckpointError, match="not the model") as error:
        consolidate(found(zero / case), tmp_path / "without")
    assert error.value.problems == (f"missing: {name}",)
    assert "base_model" in error.value.next_step
    for only in (True, False):
        ready = boot.prepare(publish(zero / case, base_model=str(base), weights_only_fetch=only))
        assert_same(tensors_of(ready.path), wanted | {name: frozen})


@pytest.mark.parametrize(
    ("case", "at"),
    [("zero2-without", "url"), ("zero2-without", "hub"), ("zero3-without", "checkpoint")],
)
def test_the_base_of_frozen_parameters_lies_anywhere(
    zero: Path, base: Path, case: str, at: str, configure: Any, origin: FaultyOrigin, tmp_path: Path
) -> None:
    name = "model.embed_tokens.weight"
    frozen = load_file(base / "model.safetensors")[name].to(torch.bfloat16)
    with Hub(base) as hub:
        model = {"url": f"file://{base}", "hub": "org/base", "checkpoint": "checkpoint:b/rank-0/m/"}
        document = configure(zero / case, base_model=model[at])
        shutil.copytree(base, origin.folder("b") / "m")
        listing = write_listing(origin, tmp_path / "b.json", "b")
        document["model_metadata"]["podloader"]["artifacts"].append(str(listing))
        config = tmp_path / "config.yaml"
        config.write_text(json.dumps(document))
        home = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-m", "loader", "prepare", str(config), "--json"]
        done = subprocess.run(
            command, env=os.environ | home, capture_output=True, text=True, check=False
        )
        hub.shutdown()
    assert done.returncode == 0, done.stderr
    out = Path(json.loads(done.stdout)["path"])
    assert_same(tensors_of(out), reference(zero / case, torch.bfloat16) | {name: frozen})
