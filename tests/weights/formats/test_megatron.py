"""Megatron-Core: what it saved answers like the model that it trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from loader import boot
from loader.errors import CheckpointError, FormatError, UnsupportedError
from loader.types import Kind
from loader.weights.formats.consolidation import consolidate
from loader.weights.formats.megatron import find_views
from loader.weights.formats.views import Heads
from loader.weights.inspect import find_checkpoints
from tests.weights.formats.conftest import (
    assert_same,
    copy_case,
    edit_config,
    found,
    names_of,
    tensors_of,
)


@pytest.mark.parametrize("case", ["torch-dist", "numbered"])
def test_it_answers_like_the_model_that_was_trained(
    megatron: Path, case: str, tmp_path: Path
) -> None:
    """Two tensor-parallel ranks, layers stacked or numbered, a padded vocabulary, tied or not."""
    checkpoint = found(megatron / case)
    assert checkpoint.kind is Kind.DCP
    out = consolidate(checkpoint, tmp_path / "out")
    model: Any = LlamaForCausalLM.from_pretrained(out, dtype="auto")
    answers = load_file(megatron / case / "answers.safetensors")
    with torch.no_grad():
        logits = model(answers["ids"]).logits
    wanted = answers["logits"][..., : logits.shape[-1]]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    assert logits.argmax(-1).equal(wanted.argmax(-1))
    assert ("lm_head.weight" in tensors_of(out)) is (case == "torch-dist")


def test_every_bit_is_one_that_a_rank_trained(megatron: Path, tmp_path: Path) -> None:
    """Each rank's own state dict holds its rows of QKV: one query group for each of two ranks."""
    tensors = tensors_of(consolidate(found(megatron / "torch-dist"), tmp_path / "out"))
    for rank in (0, 1):
        own = load_file(megatron / f"torch-dist/state-{rank}.safetensors")
        qkv = own["decoder.layers.1.self_attention.linear_qkv.weight"]
        at = "model.layers.1.self_attn"
        halves = [tensors[f"{at}.{n}_proj.weight"].chunk(2)[rank] for n in "qkv"]
        assert torch.cat(halves).equal(qkv)
        fused = own["decoder.layers.1.mlp.linear_fc1.weight"]
        gate, up = (tensors[f"model.layers.1.mlp.{n}_proj.weight"] for n in ("gate", "up"))
        assert torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]]).equal(fused)
        down = tensors["model.layers.1.mlp.down_proj.weight"].chunk(2, dim=1)[rank]
        assert down.equal(own["decoder.layers.1.mlp.linear_fc2.weight"])


def test_the_stages_of_a_pipeline(megatron: Path, tmp_path: Path) -> None:
    """Each stage counts its layers from 0; ``.metadata`` knows which they are of the whole."""
    tensors = tensors_of(consolidate(found(megatron / "pipeline"), tmp_path / "out"))
    for stage in (0, 1):
        own = load_file(megatron / f"pipeline/state-{stage}.safetensors")
        down = tensors[f"model.layers.{stage}.mlp.down_proj.weight"]
        assert down.equal(own["decoder.layers.0.mlp.linear_fc2.weight"])
    assert tensors["lm_head.weight"].equal(
        own["output_layer.weight"][: len(tensors["lm_head.weight"])]
    )


def test_experts_are_refused_by_name(megatron: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no name in Hugging Face") as error:
        consolidate(found(megatron / "experts"), tmp_path / "out")
    assert [problem.partition(":")[0] for problem in error.value.problems] == [
        "decoder.layers.mlp.router.weight",
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        "decoder.layers.mlp.experts.experts.linear_fc2.weight",
    ]
    assert "Megatron Bridge" in error.value.next_step


@pytest.mark.parametrize("switch", ["apply_layernorm_1p", "rotary_interleaved"])
def test_arguments_that_change_what_the_tensors_mean(
    megatron: Path, switch: str, tmp_path: Path
) -> None:
    """They stand in common.pt, among objects of Megatron's own that are never made."""
    case = copy_case(megatron / "torch-dist", tmp_path / "case")
    path = case / "rank-0/checkpoint-10/iter_0000010/common.pt"
    path.write_bytes((megatron / f"{switch}.pt").read_bytes())
    with pytest.raises(UnsupportedError, match="computes in another way") as error:
        consolidate(found(case), tmp_path / "out")
    assert error.value.problems[0].startswith(f"{switch} in common.pt: ")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError):
        consolidate(found(case), tmp_path / "out")


def test_the_arguments_are_read_where_the_shards_stay_at_the_origin(
    megatron: Path, publish: Any, tmp_path: Path
) -> None:
    case = copy_case(megatron / "torch-dist", tmp_path / "case")
    ready = boot.prepare(publish(case, weights_only_fetch=True))
    alone = tensors_of(consolidate(found(case), tmp_path / "out"))
    assert_same(tensors_of(ready.path), alone)
    path = case / "rank-0/checkpoint-10/iter_0000010/common.pt"
    path.write_bytes((megatron / "apply_layernorm_1p.pt").read_bytes())
    with pytest.raises(UnsupportedError, match="computes in another way"):
        boot.prepare(publish(case, weights_only_fetch=True))


def test_megatron_bridges_run_config(megatron: Path, tmp_path: Path) -> None:
    case = copy_case(megatron / "numbered", tmp_path / "case")
    text = "model:\n  layernorm_zero_centered_gamma: {}\n  num_layers: 2\n"
    path = case / "rank-1/checkpoint-10/run_config.yaml"
    path.write_text(text.format("false"))
    consolidate(found(case), tmp_path / "out")
    path.write_text(text.format("true"))
    with pytest.raises(UnsupportedError, match="computes in another way") as error:
        consolidate(found(case), tmp_path / "out2")
    assert "layernorm_zero_centered_gamma in run_config.yaml" in error.value.problems[0]


def test_a_sort_of_model_whose_layout_is_not_known(megatron: Path, tmp_path: Path) -> None:
    """Gemma's tensors bear the same names, and its norms add 1."""
    case = copy_case(megatron / "numbered", tmp_path / "case")
    edit_config(
        case / "rank-0/checkpoint-10", model_type="gemma", architectures=["GemmaForCausalLM"]
    )
    with pytest.raises(UnsupportedError, match="whose layout is not known") as error:
        consolidate(found(case), tmp_path / "out")
    assert error.value.got == "gemma"


def test_several_iterations_are_checkpoints_of_their_own(megatron: Path, tmp_path: Path) -> None:
    case = copy_case(megatron / "torch-dist", tmp_path / "case")
    for rank in (0, 1):
        home = case / f"rank-{rank}/checkpoint-10"
        shutil.copytree(home / "iter_0000010", home / "iter_0000020")
    checkpoints = find_checkpoints(case, names_of(case))
    assert [c.path.name for c in checkpoints] == ["iter_0000010", "iter_0000020"]


def test_a_rank_that_is_missing(megatron: Path, tmp_path: Path) -> None:
    case = copy_case(megatron / "torch-dist", tmp_path / "case")
    for path in (case / "rank-1/checkpoint-10/iter_0000010").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match="no rank's folder holds") as error:
        consolidate(found(case), tmp_path / "out")
    names = {problem.partition(" ")[0] for problem in error.value.problems}
    assert "decoder.layers.mlp.linear_fc1.weight" in names
    assert not [name for name in names if "exp_avg" in name]


def test_heads_that_are_another_models(megatron: Path, tmp_path: Path) -> None:
    case = copy_case(megatron / "torch-dist", tmp_path / "case")
    edit_config(case / "rank-0/checkpoint-10", num_key_value_heads=1)
    with pytest.raises(CheckpointError, match="not the model") as error:
        consolidate(found(case), tmp_path / "out")
    assert "linear_qkv" in error.value.problems[0]
    edit_config(case / "rank-0/checkpoint-10", num_attention_heads=None)
    with pytest.raises(CheckpointError, match="how the trainer's tensors are laid out"):
        consolidate(found(case), tmp_path / "out")


def test_a_layer_that_hugging_face_does_not_know() -> None:
    names = ("embedding.word_embeddings.weight", "decoder.layers.mlp.router")
    with pytest.raises(UnsupportedError, match="no name in Hugging Face") as error:
        find_views(dict.fromkeys(names, (2, 4)), Heads(4, 2, 8, 100), "here")
    assert error.value.problems == ("decoder.layers.mlp.router: [2, 4]",)


def test_a_file_per_rank_is_known_and_refused(megatron: Path, tmp_path: Path) -> None:
    checkpoint = found(megatron / "ranks")
    assert checkpoint.kind is Kind.MEGATRON
    assert checkpoint.path == megatron / "ranks/rank-0/checkpoint-10"
    with pytest.raises(UnsupportedError, match="does not say how its tensors were cut") as error:
        consolidate(checkpoint, tmp_path / "out")
    assert error.value.got == "2 ranks: mp_rank_00, mp_rank_01"
    assert "torch_dist" in error.value.expected
    assert not (tmp_path / "out").exists()
