"""Models whose checkpoints name their tensors otherwise than their modules are named."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from loader.adapters.attach import NamedAdapter, attach
from loader.adapters.merge import WeightedAdapter, merge
from tests.adapters.peft import differing
from tests.models import draw_adapter

TEXT: dict[str, Any] = {
    "vocab_size": 365,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TARGETS = ["q_proj", "k_proj", "down_proj", "linear_1", "qkv", "proj", "lm_head"]


def build(kind: str) -> Any:
    match kind:
        case "llava":
            vision = CLIPVisionConfig(**VISION, projection_dim=32)
            text = LlamaConfig(**TEXT)
            config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=364)
            return LlavaForConditionalGeneration(config)
        case "qwen2_5_vl":
            rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
            sight = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
            return Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(
                    text_config={**TEXT, "rope_parameters": rope},
                    vision_config={**sight, "out_hidden_size": 64},
                )
            )
        case _:
            text = {**TEXT, "head_dim": 32}
            config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
            return Gemma3ForConditionalGeneration(config)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "gemma3"])
def test_equal_to_peft_in_every_bit(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = build(kind).to(torch.bfloat16)
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    model.save_pretrained(base)
    on_disk = set(load_file(base / "model.safetensors"))
    assert on_disk - set(model.state_dict()), "the names are to differ"
    load = type(model).from_pretrained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        targets = [t for t in TARGETS if kind != "gemma3" or t != "lm_head"]  # tied there
        tuned = get_peft_model(load(base, dtype="auto"), LoraConfig(r=4, target_modules=targets))
        draw_adapter(tuned)
        tuned.save_pretrained(adapter)
        expected = PeftModel.from_pretrained(load(base, dtype="auto"), adapter)
        theirs = dict(expected.merge_and_unload().state_dict())
    merge(base, [WeightedAdapter(adapter)], out, exact="peft")
    assert set(load_file(out / "model.safetensors")) == on_disk
    ours = dict(load(out, dtype="auto").state_dict())
    assert not differing(ours, theirs)
    assert len(differing(ours, dict(load(base, dtype="auto").state_dict()))) > 8
    attach(base, [NamedAdapter("a", adapter)], tmp_path / "attached")
