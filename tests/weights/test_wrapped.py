"""A PeftModel's whole state dict, saved as a model's: known, and never served as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from loader.types import Kind
from loader.weights.formats.refused import find_refusal
from loader.weights.inspect import open_checkpoint
from tests.models import tiny_llama


@pytest.mark.parametrize("saved", ["whole", "shards", "pickle", "pickled shards"])
@pytest.mark.parametrize("inner", [False, True])
def test_a_state_dict_of_a_peft_model(tmp_path: Path, inner: bool, saved: str) -> None:
    base = tiny_llama(tmp_path / "base")
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"])
    )
    state = (model.base_model.model if inner else model).state_dict()
    (base / "model.safetensors").unlink()
    save(base, {n: t.contiguous() for n, t in state.items()}, saved)
    checkpoint = open_checkpoint(base)
    assert checkpoint.kind is Kind.UNKNOWN
    refusal = find_refusal(checkpoint)
    assert refusal is not None
    assert "PeftModel" in refusal.expected
    assert "merge_and_unload" in refusal.next_step


def save(folder: Path, state: dict[str, torch.Tensor], saved: str) -> None:
    """Save *state* as a model; in shards the embeddings, which are not wrapped, are the first."""
    stem, suffix = ("pytorch_model", "bin") if "pickle" in saved else ("model", "safetensors")
    write = torch.save if "pickle" in saved else save_file
    if "shards" not in saved:
        write(state, folder / f"{stem}.{suffix}")
        return
    weight_map = {n: f"{stem}-0000{1 if 'embed' in n else 2}-of-00002.{suffix}" for n in state}
    for file in set(weight_map.values()):
        write({n: t for n, t in state.items() if weight_map[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
