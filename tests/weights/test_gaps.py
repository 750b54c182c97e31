"""What a checkpoint lacks of its model; and good models, of which nothing is said."""

from __future__ import annotations

import contextlib
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.architectures import Case, build
from loader.prepare.wholeness import read_shapes
from loader.weights.formats import learning
from loader.weights.gaps import Gaps, compare_layers, find_gaps
from tests.models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")

CAUSAL = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
CASES = [
    *(Case(kind, CAUSAL[kind]) for kind in ("gpt2", "gemma2", "mixtral", "qwen3_moe", "mamba")),
    *(Case(kind, CAUSAL[kind]) for kind in ("phi3", "deepseek_v3", "nemotron_h", "gpt_oss")),
    Case("bert", "BertModel"),
    Case("bert", "BertForMaskedLM"),
    Case("whisper", "WhisperForConditionalGeneration"),
    Case("t5", "T5ForConditionalGeneration"),
    Case("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    Case("llava", "LlavaForConditionalGeneration"),
]
Q = "model.layers.1.self_attn.q_proj.weight"


def told(folder: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config and the shapes of what lies in *folder*."""
    config = json.loads((folder / "config.json").read_text()) | changes
    return config, dict(read_shapes(folder, config))


def without(shapes: Mapping[str, Any], *names: str) -> dict[str, Any]:
    assert shapes.keys() >= set(names)
    return {name: shape for name, shape in shapes.items() if name not in names}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama", tokenizer=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.class_name)
def test_any_tensor_that_is_gone(case: Case, tmp_path: Path) -> None:
    """Saved by transformers it is whole; without any one of its tensors it is not."""
    build(case).save_pretrained(tmp_path)
    config, shapes = told(tmp_path)
    assert find_gaps(config, shapes) == Gaps()
    for gone in random.Random(1).sample(sorted(shapes), 4):
        assert find_gaps(config, without(shapes, gone)).missing == (gone,)


@pytest.mark.parametrize(
    "gone",
    [Q, "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"],
)
def test_a_part_of_what_vllm_fuses(llama: Path, gone: str) -> None:
    config, shapes = told(llama)
    assert find_gaps(config, without(shapes, gone)) == Gaps(missing=(gone,))


def test_a_tied_head_may_be_left_out(tmp_path: Path) -> None:
    config, shapes = told(tiny_llama(tmp_path, tokenizer=False, tie_word_embeddings=True))
    assert "lm_head.weight" not in shapes
    assert find_gaps(config, shapes) == Gaps()
    both = shapes | {"lm_head.weight": shapes["model.embed_tokens.weight"]}
    assert find_gaps(config, both) == Gaps()
    head_alone = without(both, "model.embed_tokens.weight")
    assert find_gaps(config, head_alone) == Gaps()
    assert find_gaps(config | {"tie_word_embeddings": False}, shapes).missing


def test_more_layers_than_the_config_says_and_fewer(llama: Path) -> None:
    config, shapes = told(llama)
    assert len(find_gaps(config | {"num_hidden_layers": 3}, shapes).missing) == 9
    fewer = find_gaps(config | {"num_hidden_layers": 1}, shapes)
    assert (len(fewer.extra), fewer.missing) == (9, ())


def test_another_size(llama: Path) -> None:
    config, shapes = told(llama)
    found = find_gaps(config, shapes | {Q: (64, 128)})
    assert found.unlike == (f"{Q}: [64, 128], the model has [128, 128]",)
    assert find_gaps(config, shapes | {Q: None}) == Gaps()


def test_old_checkpoints_hold_what_models_make_themselves(llama: Path) -> None:
    config, shapes = told(llama)
    old = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": (16,) for n in (0, 1)}
    assert find_gaps(config, shapes | old) == Gaps()
    assert find_gaps(config, shapes | {"model.layers.0.scale": (1,)}).extra


def test_an_encoder_without_its_pooler(tmp_path: Path) -> None:
    """Embeddings do not go through it; half of one is a fault."""
    build(Case("bert", "BertModel")).save_pretrained(tmp_path)
    config, shapes = told(tmp_path)
    pooler = ("pooler.dense.weight", "pooler.dense.bias")
    assert find_gaps(config, without(shapes, *pooler)) == Gaps()
    assert find_gaps(config, without(shapes, pooler[0])).missing == pooler[:1]


def test_a_language_model_alone_of_one_with_a_tower(tmp_path: Path) -> None:
    build(Case("llava", "LlavaForConditionalGeneration")).save_pretrained(tmp_path)
    config, shapes = told(tmp_path)
    tower = [name for name in shapes if "vision_tower" in name]
    less = without(shapes, *tower)
    assert find_gaps(config, less).missing
    assert find_gaps(config, less, text_only=True).missing == ()
    gone = next(name for name in less if "q_proj" in name)
    assert find_gaps(config, without(less, gone), text_only=True).missing == (gone,)


def test_what_a_quantiser_alone_knows_stands_for_its_neighbours(llama: Path) -> None:
    config, shapes = told(llama, quantization_config={"quant_method": "new"})
    odd = without(shapes, Q) | {Q.replace("weight", "planes"): None}
    assert find_gaps(config, odd).missing == ()
    norm = "model.norm.weight"
    assert find_gaps(config, without(odd, norm)).missing == (norm,)


@pytest.mark.parametrize("changes", [{"auto_map": {}}, {}])
def test_another_layout_is_not_taken_for_gaps(llama: Path, changes: dict[str, Any]) -> None:
    """Of remote code, or of what only vLLM knows."""
    config, shapes = told(llama, **changes)
    other = {name.replace("self_attn", "mixer"): shape for name, shape in shapes.items()}
    if not changes:
        other = {f"backbone.{name}": shape for name, shape in other.items()}
    found = find_gaps(config, other)
    assert (found.missing, found.unlike) == ((), ())


@pytest.mark.parametrize("architectures", [["MyForCausalLM"], None, [], "LlamaForCausalLM"])
def test_a_class_that_transformers_does_not_have(llama: Path, architectures: Any) -> None:
    """Layers are compared with each other; what one of them lacks may be as it should be."""
    config, shapes = told(llama, num_hidden_layers=4, architectures=architectures)
    four = shapes | {n.replace(".1.", f".{i}."): s for n, s in shapes.items() for i in (2, 3)}
    assert find_gaps(config, four) == Gaps()
    assert find_gaps(config, without(four, Q)) == Gaps(doubts=(Q,))


def test_a_hole_in_the_numbers_of_experts() -> None:
    names = [f"layers.0.experts.{n}.{part}.weight" for n in range(4) for part in ("w1", "w2", "w3")]
    shapes = dict.fromkeys(names, (4, 4))
    assert compare_layers(shapes) == Gaps()
    gone = [name for name in names if ".experts.2." in name]
    assert compare_layers(without(shapes, *gone)).missing == ("layers.0.experts.2.*",)
    assert compare_layers(without(shapes, gone[0])).missing == (gone[0],)


def test_layers_of_several_kinds_are_no_gaps() -> None:
    """Hybrids, layers that share keys with others, a first one without its norm."""
    attention = [f"layers.{n}.attn.{p}.weight" for n in (0, 2, 4) for p in "qkv"]
    mamba = [f"layers.{n}.mamba.{p}" for n in (1, 3) for p in ("A_log", "in_proj.weight")]
    assert compare_layers(dict.fromkeys([*attention, *mamba], (2, 2))) == Gaps()
    shared = [
        name for name in attention if not name.startswith(("layers.4.attn.k", "layers.2.attn.k"))
    ]
    assert compare_layers(dict.fromkeys([*shared, *mamba], (2, 2))).missing == ()


def test_pickled_weights(llama: Path, tmp_path: Path) -> None:
    config, shapes = told(llama)
    state = {name: torch.zeros(shape) for name, shape in without(shapes, Q).items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert find_gaps(config, read_shapes(tmp_path, config)).missing == (Q,)


def test_in_a_process_of_its_own(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shapes = told(llama)
    monkeypatch.setattr(learning, "find_gaps", lambda *_, **__: pytest.fail("asked here"))
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    place = llama / "config.json"
    with contextlib.closing(learning.GapLearner()) as learner:
        found = learner.learn(place, config, without(shapes, Q), text_only=False)
    assert found == Gaps(missing=(Q,))
