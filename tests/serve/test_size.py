"""The memory of a model, against figures that are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig

from loader.serve.size import count_parameters, size_of

LLAMA_8B: dict[str, Any] = {
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
}
KIB, GB = 1024, 10**9


def test_the_kv_cache_of_a_known_model() -> None:
    size = size_of(LLAMA_8B, 16 * GB, "x")
    assert size.kv_bytes(1) == 128 * KIB
    assert size.kv_bytes(1000, gpus=2) == 64 * KIB * 1000
    assert size.kv_bytes(1, gpus=16) == 16 * KIB  # a head is never split
    assert (size.weight_bytes, size.dtype, size.context) == (16 * GB, "bfloat16", 131072)


def test_latent_attention_keeps_one_vector() -> None:
    deepseek = LLAMA_8B | {
        "num_hidden_layers": 61,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "num_key_value_heads": 128,
    }
    assert size_of(deepseek, 1, "x").kv_bytes(1) == 61 * 576 * 2


def test_whisper_keeps_what_it_heard_as_well() -> None:
    config = WhisperConfig().to_dict() | {"d_model": 384, "decoder_layers": 4}
    size = size_of(config, 1, "x")
    assert size.context == 448
    assert size.kv_bytes(448) == 2 * 4 * config["decoder_attention_heads"] * size.head_dim * 2 * (
        448 + 1500
    )


@pytest.mark.parametrize(
    ("stored", "dtype", "weight_bytes"),
    [
        ("float32", "bfloat16", 8),
        ("bfloat16", "bfloat16", 16),
        ("float16", "float16", 16),
        ("torch.float16", "float16", 16),
    ],
)
def test_what_vllm_makes_of_a_dtype(stored: str, dtype: str, weight_bytes: int) -> None:
    for config in (LLAMA_8B | {"dtype": stored}, LLAMA_8B | {"dtype": None, "torch_dtype": stored}):
        size = size_of(config, 16, "x")
        assert (size.dtype, size.weight_bytes) == (dtype, weight_bytes)


def test_quantized_weights_stay_as_they_are() -> None:
    config = LLAMA_8B | {"quantization_config": {"quant_method": "fp8"}, "dtype": "float32"}
    assert (size_of(config, 8, "x").dtype, size_of(config, 8, "x").weight_bytes) == ("auto", 8)


def test_a_config_inside_another() -> None:
    outer = {"model_type": "gemma3", "dtype": "bfloat16", "text_config": LLAMA_8B}
    assert size_of(outer, 5, "x").kv_bytes(1) == 128 * KIB


@pytest.mark.parametrize("tied", [True, False])
def test_counted_parameters_are_those_of_the_real_model(tied: bool) -> None:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=1000, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        real = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert count_parameters(config.to_dict()) == pytest.approx(real, rel=0.01)
    size = size_of(config.to_dict(), None, "x")
    assert size.weight_bytes == pytest.approx(2 * real, rel=0.01)
    assert "counted" in size.weights_from


def test_lora_slots_by_the_tensors_of_a_real_adapter() -> None:
    size = size_of(LLAMA_8B, 1, "x")
    # q, k, v, o, gate, up, down of Llama 3.1 8B at rank 16: 41,943,040 parameters, as PEFT prints.
    assert size.lora_bytes(16, 1) == 2 * 41_943_040
    assert size.lora_bytes(16, 4, gpus=2) == 4 * 41_943_040
