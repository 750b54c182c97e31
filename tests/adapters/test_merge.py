"""Merging, compared in every bit with PEFT's ``merge_and_unload``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from loader.adapters.merge import PROVENANCE, WeightedAdapter, merge
from loader.errors import AdapterError
from tests.adapters.peft import (
    differing,
    load,
    load_with_adapter,
    logits,
    merged_state,
    state,
)
from tests.models import tiny_llama, train_or_draw_lora

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "bf16": tiny_llama(root / "bf16", dtype=torch.bfloat16, max_shard_size="200KB"),
        "f16": tiny_llama(root / "f16", dtype=torch.float16, attention_bias=True),
        "f32": tiny_llama(root / "f32"),
        "tied32": tiny_llama(root / "tied32", tie_word_embeddings=True),
        "tied": tiny_llama(root / "tied", dtype=torch.bfloat16, tie_word_embeddings=True),
    }


def merged(base: Path, adapter: Path, output: Path, **options: Any) -> Path:
    ready = merge(base, [WeightedAdapter(adapter)], output, **{"exact": "peft", **options})
    assert (ready.path, ready.adapters, ready.tokenizer) == (output, (), output)
    return output


# PEFT warns of settings that are chosen here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear layers": ("bf16", {"target_modules": LINEAR, "r": 8}),
    "float16": ("f16", {"target_modules": LINEAR}),
    "float32": ("f32", {"target_modules": LINEAR}),
    "adapter in bfloat16": ("bf16", {"dtype": torch.bfloat16}),
    "rsLoRA": ("bf16", {"use_rslora": True, "r": 6}),
    "patterns": (
        "bf16",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 16, r"^model.*\.o_proj": 3},
            "alpha_pattern": {"k_proj": 3, "layers.1.mlp.up_proj": 1},
        },
    ),
    "rsLoRA with patterns": ("f16", {"use_rslora": True, "rank_pattern": {"layers.0.*q_proj": 9}}),
    "embedding and head": ("bf16", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "modules to save": ("bf16", {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "tokens": ("bf16", {"trainable_token_indices": [7, 3, 200]}),
    "tokens of a tied base": ("tied", {"trainable_token_indices": {"embed_tokens": [7, 3]}}),
    "biases": ("f16", {"bias": "all"}),
    "biases of LoRA layers": ("f16", {"bias": "lora_only"}),
    "LoRA biases": ("f16", {"lora_bias": True}),
    "DoRA": ("bf16", {"use_dora": True, "target_modules": [*LINEAR, "embed_tokens", "lm_head"]}),
    "DoRA with rsLoRA": ("f32", {"use_dora": True, "use_rslora": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_peft_in_every_bit(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    base, lora = CASES[name]
    adapter = train_or_draw_lora(bases[base], tmp_path / "adapter", **lora)
    ours = state(merged(bases[base], adapter, tmp_path / "out"))
    assert not differing(ours, merged_state(bases[base], adapter))
    assert differing(ours, state(bases[base])), "the adapter changed nothing"


def test_pieces_do_not_show(tmp_path: Path) -> None:
    """Wide rows are merged in pieces; 129 rows, in pieces of 128, would leave one by itself."""
    base = tiny_llama(
        tmp_path / "base", hidden_size=2048, intermediate_size=129, num_hidden_layers=1
    )
    adapter = train_or_draw_lora(base, tmp_path / "a", r=16, target_modules=["up_proj"])
    ours = state(merged(base, adapter, tmp_path / "out"))
    assert not differing(ours, merged_state(base, adapter))


@pytest.mark.parametrize(
    "name", ["all linear layers", "float16", "embedding and head", "DoRA", "LoRA biases"]
)
def test_one_rounding_by_default(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    """What PEFT computes over the same base in float64 and rounds once, but for float32's error."""
    base, lora = CASES[name]
    adapter = train_or_draw_lora(bases[base], tmp_path / "adapter", **lora)
    merge(bases[base], [WeightedAdapter(adapter)], tmp_path / "out")
    wide = tiny_copy(bases[base], tmp_path / "wide", torch.float64)
    for tensor, exact in merged_state(wide, adapter).items():
        ours = state(tmp_path / "out")[tensor]
        half_step = exact.abs() * torch.finfo(ours.dtype).eps / 2
        assert ((ours.double() - exact.double()).abs() <= half_step * 1.01 + 1e-6).all(), tensor


def tiny_copy(base: Path, folder: Path, dtype: torch.dtype) -> Path:
    load(base).to(dtype).save_pretrained(folder)
    return folder


def test_a_change_that_rounding_swallows(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = train_or_draw_lora(bases["bf16"], tmp_path / "adapter", spread=1e-30)
    with pytest.raises(AdapterError, match="lost in rounding"):
        merge(bases["bf16"], [WeightedAdapter(adapter)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_everything_that_belongs_to_a_model_is_there(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["bf16"]
    adapter = train_or_draw_lora(base, tmp_path / "adapter")
    seen: list[tuple[int, int]] = []
    out = merged(base, adapter, tmp_path / "out", on_progress=lambda *at: seen.append(at))
    assert {p.name for p in out.iterdir()} == {p.name for p in base.iterdir()} | {PROVENANCE}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    size = sum(t.nbytes for path in base.glob("*.safetensors") for t in load_file(path).values())
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)
    assert json.loads((out / PROVENANCE).read_text())["base"] == str(base)
    # Files that were not touched keep their bytes; all keep their tensors.
    for path in base.glob("*.safetensors"):
        assert list(load_file(path)) == list(load_file(out / path.name))


@pytest.mark.parametrize(
    ("lora", "stays"),
    [
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["embed_tokens", "lm_head"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"]}, True),
    ],
)
def test_tied_embeddings_answer_as_the_adapter_did(
    bases: dict[str, Path], tmp_path: Path, lora: dict[str, Any], stays: bool
) -> None:
    base = bases["tied32"]
    adapter = train_or_draw_lora(
        base, tmp_path / "adapter", steps=3 * ("ensure_weight_tying" in lora), **lora
    )
    out = merged(base, adapter, tmp_path / "out")
    expected = logits(load_with_adapter(base, adapter))
    torch.testing.assert_close(logits(load(out)), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(load(base)), expected, rtol=1e-3, atol=1e-3)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is stays


def test_conv1d(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=365, n_embd=64, n_layer=2, n_head=2, n_positions=64, tie_word_embeddings=False
    )
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "gpt2")
    cases: dict[str, dict[str, Any]] = {
        "plain": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
        "dora": {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
        "with a layer that is none": {"target_modules": ["c_attn", "lm_head"]},
    }
    for name, lora in cases.items():
        adapter = train_or_draw_lora(tmp_path / "gpt2", tmp_path / name, **lora)
        ours = state(merged(tmp_path / "gpt2", adapter, tmp_path / f"{name}-out"))
        assert not differing(ours, merged_state(tmp_path / "gpt2", adapter))


def test_fan_in_fan_out_of_layers_that_are_not(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT believes the layer's class, not the config: only a shape that does not fit is turned."""
    adapter = train_or_draw_lora(bases["bf16"], tmp_path / "adapter", target_modules=LINEAR)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": True}))
    ours = state(merged(bases["bf16"], adapter, tmp_path / "out"))
    assert not differing(ours, merged_state(bases["bf16"], adapter))


def test_the_trained_copy_of_a_module_counts(bases: dict[str, Path], tmp_path: Path) -> None:
    """A raw state dict holds a module twice: as it was, and as it was trained."""
    base = bases["bf16"]
    adapter = train_or_draw_lora(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    expected = merged_state(base, adapter)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.lm_head"
    trained = tensors.pop(f"{name}.weight")
    tensors[f"{name}.original_module.weight"] = torch.zeros_like(trained)
    tensors[f"{name}.modules_to_save.default.weight"] = trained
    save_file(tensors, path)
    assert not differing(state(merged(base, adapter, tmp_path / "out")), expected)


@pytest.mark.parametrize("how", ["linear", "cat"])
def test_several_adapters_with_weights(bases: dict[str, Path], tmp_path: Path, how: Any) -> None:
    base = bases["f32"]
    folders = [
        train_or_draw_lora(base, tmp_path / f"a{i}", seed=i, target_modules=targets)
        for i, targets in enumerate((LINEAR, ["q_proj", "k_proj", "embed_tokens"], ["q_proj"]))
    ]
    weights = [1.0, 0.5, -0.25]
    model = PeftModel.from_pretrained(load(base), folders[0], adapter_name="0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(i))
    model.add_weighted_adapter(["0", "1", "2"], weights, "all", combination_type=how)
    model.set_adapter("all")
    theirs = dict(model.merge_and_unload().state_dict())
    merge(
        base,
        [WeightedAdapter(f, w) for f, w in zip(folders, weights, strict=True)],
        tmp_path / "out",
        combine=how,
    )
    ours = state(tmp_path / "out")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


def test_one_adapter_with_a_weight(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["f32"]
    adapter = train_or_draw_lora(base, tmp_path / "adapter")
    merge(base, [WeightedAdapter(adapter, 0.0)], tmp_path / "out")
    assert not differing(state(tmp_path / "out"), state(base))


def test_pickled_adapter_and_base(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["f32"]
    adapter = train_or_draw_lora(base, tmp_path / "adapter", safe_serialization=False)
    assert (adapter / "adapter_model.bin").exists()
    ours = state(merged(base, adapter, tmp_path / "out", allow_pickle=True))
    assert not differing(ours, merged_state(base, adapter))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((base / "config.json").read_bytes())
    torch.save(load_file(base / "model.safetensors"), pickled / "pytorch_model.bin")
    again = state(merged(pickled, adapter, tmp_path / "out2", allow_pickle=True))
    assert not differing(again, ours)
