"""Tiny real models, tokenizers and adapters, built in place in well under a second each."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "what is the capital of france? the capital of france is paris.",
    "a model answers what it was asked, and an adapter changes the answer.",
    "0 1 2 3 4 5 6 7 8 9 plus minus times is",
]


def tiny_tokenizer(
    folder: Path,
    *,
    corpus: Iterable[str] = CORPUS,
    chat_template: str = CHAT_TEMPLATE,
    extra_tokens: Iterable[str] = (),
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on *corpus* and save it into *folder*."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[*SPECIAL, *extra_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(corpus), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        chat_template=chat_template,
    )
    fast.save_pretrained(folder)
    return fast


def tiny_llama(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB",
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Save a two-layer Llama with random weights (and a tokenizer) into *folder*; return it.

    ``overrides`` go to ``LlamaConfig``. Head size 32, which vLLM's CPU kernels accept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fast = tiny_tokenizer(folder) if tokenizer else None
    settings: dict[str, Any] = {
        "vocab_size": len(fast) if fast else 384,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(settings | overrides))).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def train_or_draw_lora(
    base: Path,
    out: Path,
    *,
    seed: int = 0,
    steps: int = 0,
    text: str = "the capital of france is paris.",
    spread: float = 0.1,
    dtype: torch.dtype | None = None,
    safe_serialization: bool = True,
    model_class: Any = AutoModelForCausalLM,
    **lora: Any,
) -> Path:
    """Save a LoRA over *base* into *out*; return it.

    With ``steps`` it is trained on *text*; without, every adapter tensor is drawn from a normal
    distribution of deviation *spread*. ``lora`` go to ``LoraConfig``.
    """
    torch.manual_seed(seed)
    model = model_class.from_pretrained(base, dtype="auto")
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT tells of choices that tests make on purpose
        tuned = get_peft_model(model, LoraConfig(**(settings | lora)))
        if steps:
            train(tuned, base, text, steps)
        else:
            draw_adapter(tuned, seed=seed, spread=spread)
        tuned = tuned.to(dtype) if dtype else tuned
        tuned.save_pretrained(out, safe_serialization=safe_serialization)
    return out


def draw_adapter(tuned: torch.nn.Module, *, seed: int = 0, spread: float = 0.1) -> None:
    """Fill every trainable tensor: what was zero or one at first would hide mistakes."""
    torch.manual_seed(seed)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape) * spread
            parameter.data = parameter.data + drawn.to(parameter.dtype)


def train(model: torch.nn.Module, base: Path, text: str, steps: int) -> None:
    """Train the trainable tensors of *model* on *text* until it knows it by heart."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
