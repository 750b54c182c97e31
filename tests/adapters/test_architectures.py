"""Every way in which checkpoints and modules differ, merged as PEFT does: some of the sweep."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from benchmarks.architectures import list_cases, try_case
from loader.adapters.attach import NamedAdapter, attach
from loader.adapters.merge import WeightedAdapter, merge
from loader.errors import UnsupportedError
from tests.adapters.peft import differing
from tests.models import draw_adapter, tiny_llama, train_or_draw_lora

CLASSES = {
    "AriaForConditionalGeneration": "experts stored (in, out)",
    "BertForMaskedLM": "an encoder, its head tied",
    "GPT2LMHeadModel": "stored (in, out)",
    "Gemma2ForCausalLM": "norms around both halves",
    "GraniteMoeForCausalLM": "stacks under other names",
    "GteForMaskedLM": "fused gate and up, fused q, k and v",
    "HrmTextForCausalLM": "fused with a gate",
    "JetMoeForCausalLM": "stacks that are called weight",
    "LlamaForCausalLM": "trained without its head",
    "MistralForCausalLM": "plain",
    "MixtralForCausalLM": "an expert a tensor",
    "MllamaForConditionalGeneration": "two towers",
    "NemotronHForCausalLM": "backbone on disk",
    "PhimoeForCausalLM": "a router",
    "Qwen2AudioForConditionalGeneration": "renamed by its class",
    "Qwen2ForCausalLM": "biases",
    "Qwen3ForCausalLM": "norms of queries and keys",
    "Qwen3VLMoeForConditionalGeneration": "stacks turned on disk",
    "WhisperForConditionalGeneration": "hears",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CLASSES)
def test_equal_to_peft(name: str, tmp_path: Path) -> None:
    (case,) = (case for case in list_cases(all_models=False) if case.class_name == name)
    outcomes = dict(try_case(case, tmp_path))
    assert {outcome.kind for outcome in outcomes.values()} == {"equal"}, outcomes


def make(model: Any, folder: Path, **lora: Any) -> tuple[Path, Path]:
    """Save *model* and an adapter over it."""
    base, adapter = folder / "base", folder / "adapter"
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=parameter.dtype) * 0.1
    model.save_pretrained(base)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8} | lora
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(type(model).from_pretrained(base), LoraConfig(**settings))
        draw_adapter(tuned)
        tuned.save_pretrained(adapter)
    return base, adapter


def as_peft(model_class: Any, base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = PeftModel.from_pretrained(model_class.from_pretrained(base), adapter)
        return {n: t.clone() for n, t in tuned.merge_and_unload().state_dict().items()}


def merged(base: Path, adapter: Path, out: Path) -> Path:
    return merge(base, [WeightedAdapter(adapter)], out, exact="peft").path


SMALL_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 96, "n_positions": 32}


@pytest.mark.parametrize("targets", [["c_proj"], ["c_attn", "c_proj", "c_fc"]])
def test_a_square_of_a_class_that_transformers_does_not_know(
    tmp_path: Path, targets: list[str]
) -> None:
    """What PEFT wrapped as Conv1D stores (in, out), whatever the model is called."""
    base, adapter = make(GPT2LMHeadModel(GPT2Config(**SMALL_GPT)), tmp_path, target_modules=targets)
    wanted = as_peft(GPT2LMHeadModel, base, adapter)
    config = base / "config.json"
    about = json.loads(config.read_text())
    config.write_text(json.dumps(about | {"model_type": "jais", "architectures": ["JAISLMHead"]}))
    out = merged(base, adapter, tmp_path / "out")
    (out / "config.json").write_text(json.dumps(about))
    assert not differing(dict(GPT2LMHeadModel.from_pretrained(out).state_dict()), wanted)


@pytest.mark.parametrize(
    ("model", "embedding"),
    [
        (
            MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=96)),
            "embeddings",
        ),
        (GPT2LMHeadModel(GPT2Config(**SMALL_GPT)), "wte"),
    ],
    ids=["mamba", "gpt2"],
)
def test_a_tied_embedding_changes_alone(model: Any, embedding: str, tmp_path: Path) -> None:
    """Fine-tuning changed the embedding and not the head: so does the merged model."""
    base, adapter = make(model, tmp_path, target_modules=[embedding])
    tokens = torch.tensor([[3, 17, 40, 5]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = PeftModel.from_pretrained(type(model).from_pretrained(base), adapter).eval()
    out = type(model).from_pretrained(merged(base, adapter, tmp_path / "out")).eval()
    with torch.no_grad():
        theirs, ours = tuned(input_ids=tokens).logits, out(input_ids=tokens).logits
        before = type(model).from_pretrained(base).eval()(input_ids=tokens).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, before, atol=1e-3)


def test_one_tensor_of_three_modules_is_refused(tmp_path: Path) -> None:
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2, vocab_size=96)
    base, adapter = make(
        T5ForConditionalGeneration(config), tmp_path, target_modules=["shared", "q"]
    )
    with pytest.raises(UnsupportedError) as error:
        merged(base, adapter, tmp_path / "out")
    assert attach(base, [NamedAdapter("a", adapter)], tmp_path / "tokenizer").adapters
    assert "shared.weight is one tensor with 3 others" in "".join(error.value.problems)


def test_trained_without_its_head(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    adapter = tmp_path / "adapter"
    tuned = get_peft_model(
        AutoModel.from_pretrained(base, dtype="auto"), LoraConfig(r=4, target_modules=["q_proj"])
    )
    draw_adapter(tuned)
    tuned.save_pretrained(adapter)
    wanted = as_peft(AutoModel, base, adapter)
    out = merged(base, adapter, tmp_path / "out")
    assert not differing(dict(AutoModel.from_pretrained(out, dtype="auto").state_dict()), wanted)
    whole = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert torch.equal(
        whole.lm_head.weight,
        AutoModelForCausalLM.from_pretrained(base, dtype="auto").lm_head.weight,
    )


@pytest.mark.filterwarnings("ignore")
def test_dora_on_a_convolution(tmp_path: Path) -> None:
    config = WhisperConfig(
        vocab_size=96,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_mel_bins=8,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        pad_token_id=1,
        eos_token_id=2,
        max_source_positions=20,
        max_target_positions=20,
        decoder_start_token_id=1,
    )
    targets = ["conv1", "conv2", "q_proj"]
    model = WhisperForConditionalGeneration(config)
    base, adapter = make(model, tmp_path, target_modules=targets, use_dora=True)
    wanted = as_peft(WhisperForConditionalGeneration, base, adapter)
    out = WhisperForConditionalGeneration.from_pretrained(merged(base, adapter, tmp_path / "out"))
    assert not differing(dict(out.state_dict()), wanted)


def test_a_base_of_float64(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(**SMALL_GPT)).to(torch.float64)
    base, adapter = make(model, tmp_path, target_modules=["c_attn", "c_fc"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = GPT2LMHeadModel.from_pretrained(base, dtype=torch.float64)
        wanted = PeftModel.from_pretrained(loaded, adapter).merge_and_unload().state_dict()
    out = GPT2LMHeadModel.from_pretrained(
        merged(base, adapter, tmp_path / "out"), dtype=torch.float64
    )
    assert not differing(dict(out.state_dict()), dict(wanted))


def test_a_plain_family_is_merged_without_transformers(tmp_path: Path) -> None:
    """Its import takes longer than most merges."""
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    adapter = train_or_draw_lora(base, tmp_path / "adapter")
    code = (
        "import sys; from pathlib import Path\n"
        "from loader.adapters.merge import WeightedAdapter, merge\n"
        f"merge(Path({str(base)!r}), [WeightedAdapter(Path({str(adapter)!r}))], "
        f"Path({str(tmp_path / 'out')!r}))\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
