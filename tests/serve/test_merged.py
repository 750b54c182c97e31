"""Merged and attached: both ways of one adapter say the same, in both engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loader.adapters.merge import WeightedAdapter, merge
from loader.serve.transformers import TransformersModel
from loader.serve.vllm.inprocess import VLLMModel
from loader.types import ReadyModel
from tests.models import tiny_llama, train_or_draw_lora

PROMPTS = ["the capital of france", "0 1 2 3", "what is"]
TOKENS = torch.tensor([[3, 17, 40, 5, 300, 41, 9, 2]])


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=TOKENS).logits.float()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_agree_within_rounding(tmp_path: Path, dtype: torch.dtype) -> None:
    base = tiny_llama(tmp_path / "base", dtype=dtype, tokenizer=False)
    adapter = train_or_draw_lora(base, tmp_path / "adapter", spread=0.3)
    merge(base, [WeightedAdapter(adapter)], tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    alone = logits(plain)
    attached = logits(PeftModel.from_pretrained(plain, adapter))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype))
    # A few roundings of values of that size, layer after layer.
    room = 16 * torch.finfo(dtype).eps * float(attached.abs().max())
    assert float((attached - merged).abs().max()) < room
    assert float((attached - alone).abs().max()) > 4 * room or dtype != torch.float32


async def texts(model: VLLMModel | TransformersModel, name: str) -> list[str]:
    body = {"model": name, "prompt": PROMPTS, "temperature": 0, "max_tokens": 24}
    answer: Any = await model.predict(body)
    # vLLM leaves a character that the last token cuts out, transformers shows what there is of it.
    return [choice["text"].rstrip("\N{REPLACEMENT CHARACTER}") for choice in answer["choices"]]


@pytest.mark.engine
@pytest.mark.parametrize("name", ["red", "job.blue"])
async def test_vllm_attached_says_what_merged_says(
    vllm_model: VLLMModel, ready: ReadyModel, tmp_path: Path, name: str
) -> None:
    adapter = next(adapter for adapter in ready.adapters if adapter.name == name)
    merged = merge(ready.path, [WeightedAdapter(adapter.path)], tmp_path / "merged")
    model = TransformersModel(merged, served_model_name="merged")
    model.load()
    assert await texts(vllm_model, name) == await texts(model, "merged")
    assert await texts(vllm_model, name) != await texts(vllm_model, "base")
    model.close()
