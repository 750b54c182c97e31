"""A PeftModel's whole state dict, saved as a model's: known, and never served as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from loader.types import Kind
from loader.weights.formats.refused import find_refusal
from loader.weights.inspect import open_checkpoint
from tests.models import tiny_llama


@pytest.mark.parametrize("inner", [False, True])
def test_a_state_dict_of_a_peft_model(tmp_path: Path, inner: bool) -> None:
    base = tiny_llama(tmp_path / "base")
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"])
    )
    state = (model.base_model.model if inner else model).state_dict()
    save_file({n: t.contiguous() for n, t in state.items()}, base / "model.safetensors")
    checkpoint = open_checkpoint(base)
    assert checkpoint.kind is Kind.UNKNOWN
    refusal = find_refusal(checkpoint)
    assert refusal is not None
    assert "PeftModel" in refusal.expected
    assert "merge_and_unload" in refusal.next_step
