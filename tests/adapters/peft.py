"""What PEFT itself makes of a base and an adapter: the reference for merging."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

TOKENS = torch.tensor([[3, 17, 40, 5, 300, 41, 9, 2]])


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """Return the model of a folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)


def load_with_adapter(base: Path, adapter: Path, *, vocab_size: int | None = None) -> PeftModel:
    """Return the base with the adapter in place, its embeddings resized first when asked."""
    model = load(base)
    if vocab_size:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, adapter)


def merged_state(base: Path, adapter: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Return the state dict after PEFT's ``merge_and_unload``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_with_adapter(base, adapter, **options).merge_and_unload()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Return the state dict of a folder's model as transformers loads it."""
    return dict(load(folder).state_dict())


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that are not the same in every bit."""
    names = sorted({*ours, *theirs})
    return [
        name
        for name in names
        if name not in ours
        or name not in theirs
        or ours[name].dtype != theirs[name].dtype
        or not torch.equal(ours[name], theirs[name])
    ]


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits that *model* gives for a fixed row of tokens."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return found.float()
