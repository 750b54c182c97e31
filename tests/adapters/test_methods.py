"""The rarer things PEFT can save: experts, resized vocabularies, other methods, other names."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from loader.adapters.merge import WeightedAdapter, merge
from tests.adapters.peft import (
    differing,
    load,
    load_with_adapter,
    logits,
    merged_state,
    state,
)
from tests.models import draw_adapter, tiny_llama, train_or_draw_lora

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SMALL: dict[str, Any] = {
    "vocab_size": 365,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}


def build(kind: str, folder: Path) -> Path:
    """Save a tiny model of an architecture with experts or fused projections."""
    torch.manual_seed(0)
    model: PreTrainedModel
    match kind:
        case "qwen3_moe":
            config = Qwen3MoeConfig(**SMALL, **EXPERTS, moe_intermediate_size=48)
            model = Qwen3MoeForCausalLM(config)
        case "mixtral":
            model = MixtralForCausalLM(MixtralConfig(**SMALL, **EXPERTS))
        case "gpt_oss":
            small = {**SMALL, "intermediate_size": 64}  # square: shapes do not tell orientation
            model = GptOssForCausalLM(GptOssConfig(**small, **EXPERTS))
        case "gpt_neox":
            small = {k: SMALL[k] for k in SMALL if k not in ("head_dim", "num_key_value_heads")}
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**small))
        case "gpt2":
            model = GPT2LMHeadModel(GPT2Config(vocab_size=365, n_embd=64, n_layer=2, n_head=2))
        case "classifier":
            model = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3))
        case _:
            model = Phi3ForCausalLM(Phi3Config(**{k: SMALL[k] for k in SMALL if k != "head_dim"}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def check(base: Path, adapter: Path, output: Path, **options: Any) -> None:
    merge(base, [WeightedAdapter(adapter)], output, exact="peft")
    ours = state(output)
    assert not differing(ours, merged_state(base, adapter, **options))
    assert differing(ours, state(base)), "the adapter changed nothing"


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts(tmp_path: Path, kind: str) -> None:
    base = build(kind, tmp_path / "base")
    for name, parameters in {
        "both": ["experts.gate_up_proj", "experts.down_proj"],
        "down": ["experts.down_proj"],
        "up": ["mlp.experts.gate_up_proj"],
    }.items():
        adapter = train_or_draw_lora(
            base, tmp_path / name, target_modules=["q_proj"], target_parameters=parameters, r=2
        )
        check(base, adapter, tmp_path / f"{name}-out")


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_routers(tmp_path: Path, kind: str) -> None:
    """A parameter of its own since transformers 5: a target, whose patterns name the parameter."""
    base = build(kind, tmp_path / "base")
    adapter = train_or_draw_lora(
        base,
        tmp_path / "a",
        target_modules=["q_proj"],
        target_parameters=["gate.weight"],
        rank_pattern={"gate.weight": 3},
        alpha_pattern={r"1\.mlp\.gate\.weight": 5},
    )
    check(base, adapter, tmp_path / "out")


def test_a_head_that_lies_under_another_name(tmp_path: Path) -> None:
    """GPT-NeoX: ``embed_out`` in the checkpoint, ``lm_head`` in transformers 5."""
    base = build("gpt_neox", tmp_path / "base")
    assert "embed_out.weight" in load_file(base / "model.safetensors")
    targets = ["query_key_value", "lm_head"]
    check(base, train_or_draw_lora(base, tmp_path / "a", target_modules=targets), tmp_path / "out")


def test_classifiers_get_no_head(tmp_path: Path) -> None:
    """An embedding that nothing is tied to, for there is no head over the vocabulary."""
    base = build("classifier", tmp_path / "base")
    adapter = train_or_draw_lora(
        base,
        tmp_path / "a",
        model_class=LlamaForSequenceClassification,
        target_modules=["q_proj", "embed_tokens"],
    )
    merge(base, [WeightedAdapter(adapter)], tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    assert set(before) == set(after)


def test_fused_projections(tmp_path: Path) -> None:
    base = build("phi3", tmp_path / "base")
    targets = ["qkv_proj", "gate_up_proj", "o_proj"]
    check(base, train_or_draw_lora(base, tmp_path / "a", target_modules=targets), tmp_path / "out")


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=4, alpha=3, target_modules=["q_proj", "down_proj"]),
        LoKrConfig(r=4, alpha=3, target_modules=["q_proj", "down_proj"]),
        LoKrConfig(r=2, target_modules=["q_proj"], decompose_both=True, decompose_factor=8),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        VeraConfig(r=8, target_modules=["q_proj", "v_proj"], save_projection=True),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods(tmp_path: Path, config: Any) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.float32, tokenizer=False, attention_bias=True)
    path = base / "model.safetensors"
    drawn = {
        n: torch.randn_like(t) if n.endswith("bias") else t for n, t in load_file(path).items()
    }
    save_file(drawn, path, metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(load(base), config)
        draw_adapter(tuned, spread=0.3)
        tuned.save_pretrained(tmp_path / "a")
    merge(base, [WeightedAdapter(tmp_path / "a")], tmp_path / "out", exact="peft")
    theirs = merged_state(base, tmp_path / "a")
    ours = state(tmp_path / "out")
    assert not differing(ours, theirs)
    assert differing(ours, state(base))


def test_ia3_on_conv1d(tmp_path: Path) -> None:
    """Weights that are stored (in, out), with factors for what goes in and for what comes out."""
    base = build("gpt2", tmp_path / "base")
    config = IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])
    tuned = get_peft_model(load(base), config)
    draw_adapter(tuned, spread=0.3)
    tuned.save_pretrained(tmp_path / "a")
    check(base, tmp_path / "a", tmp_path / "out")


def resize_and_save(base: Path, folder: Path, rows: int, **lora: Any) -> Path:
    """Save an adapter that was trained after tokens had been added to the base's vocabulary."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(base)
        model.resize_token_embeddings(rows, mean_resizing=False)
        tuned = get_peft_model(model, LoraConfig(r=4, **lora))
        draw_adapter(tuned)
        tuned.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [365, 369]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
)
def test_resized_vocabulary(tmp_path: Path, lora: dict[str, Any], tied: bool) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16, tie_word_embeddings=tied)
    adapter = resize_and_save(base, tmp_path / "a", 370, **lora)
    merge(base, [WeightedAdapter(adapter)], tmp_path / "out", exact="peft")
    ours = state(tmp_path / "out")
    assert len(ours["model.embed_tokens.weight"]) == len(ours["lm_head.weight"]) == 370
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == 370
    separate = "modules_to_save" in lora or "embed_tokens" in lora["target_modules"]
    assert config["tie_word_embeddings"] is (tied and not separate)
    if tied and "embed_tokens" in lora["target_modules"]:
        return  # PEFT merges both changes into the one tensor that it still ties
    assert not differing(ours, merged_state(base, adapter, vocab_size=370))


@pytest.mark.parametrize(
    ("lora", "rows"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, None),
        ({"target_modules": ["q_proj", "embed_tokens"]}, 370),
        ({"target_modules": ["q_proj", "lm_head"]}, 370),
        ({"target_modules": ["lm_head"], "trainable_token_indices": [3, 41]}, None),
    ],
)
def test_tied_pairs_that_change_by_halves(
    tmp_path: Path, lora: dict[str, Any], rows: int | None
) -> None:
    """New and trained rows reach both of a tied pair, a LoRA only the one that it is on."""
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    adapter = resize_and_save(base, tmp_path / "a", rows or 365, **lora)
    merge(base, [WeightedAdapter(adapter)], tmp_path / "out")
    expected = logits(load_with_adapter(base, adapter, vocab_size=rows))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)


def test_names_of_a_multimodal_runtime(tmp_path: Path) -> None:
    """A checkpoint named as transformers 4 named it, an adapter as transformers 5 does."""
    base = tiny_llama(tmp_path / "base")
    adapter = train_or_draw_lora(base, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    merge(base, [WeightedAdapter(adapter)], tmp_path / "out")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = load_file(base / "model.safetensors")
    save_file({f"language_model.{n}": t for n, t in tensors.items()}, old / "model.safetensors")
    weights = adapter / "adapter_model.safetensors"
    renamed = {
        n.replace("model.model.", "model.model.language_model."): t
        for n, t in load_file(weights).items()
    }
    save_file(renamed, weights)
    merge(old, [WeightedAdapter(adapter)], tmp_path / "old-out")
    found = load_file(tmp_path / "old-out/model.safetensors")
    expected = load_file(tmp_path / "out/model.safetensors")
    assert not differing({n.removeprefix("language_model."): t for n, t in found.items()}, expected)
