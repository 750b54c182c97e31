"""The models that benchmarks work on: a Llama like TinyLlama's, with random weights in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

VOCABULARY = 32000


def make_llama(layers: int) -> LlamaForCausalLM:
    """Return a model of 1.1B parameters with 22 *layers*; the same weights each time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def make_base_and_adapter(
    folder: Path, layers: int, max_shard_size: str = "500MB"
) -> tuple[Path, Path]:
    """Return a base and a LoRA on all its linear layers, made in *folder* unless they are there."""
    base, adapter = folder / f"base-{layers}-{max_shard_size}", folder / f"adapter-{layers}"
    if not (base / "config.json").exists():
        make_llama(layers).save_pretrained(base, max_shard_size=max_shard_size)
    if not adapter.exists():
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaForCausalLM

        tuned = get_peft_model(
            LlamaForCausalLM.from_pretrained(base, dtype="auto"),
            LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        )
        torch.manual_seed(0)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        tuned.save_pretrained(adapter)
    return base, adapter
