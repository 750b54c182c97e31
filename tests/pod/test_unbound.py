"""A pod asks its engine's process what vLLM has layers for, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.models import tiny_tokenizer, train_or_draw_lora
from tests.origin import FaultyOrigin, serving
from tests.pod.pods import needs_namespaces, start_pod, write_config

pytestmark = pytest.mark.engine


def gpt2(folder: Path) -> Path:
    """An architecture that vLLM serves and has no LoRA for."""
    folder.mkdir()
    size = len(tiny_tokenizer(folder))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_embd=64, n_layer=2, n_head=2, n_positions=256)
    )
    model.save_pretrained(folder)
    return folder


def test_an_adapter_that_vllm_would_not_take_is_merged(tmp_path: Path) -> None:
    needs_namespaces()
    base = gpt2(tmp_path / "gpt2")
    lora = train_or_draw_lora(base, tmp_path / "lora", target_modules=["c_attn"], spread=0.3)
    files = FaultyOrigin(tmp_path / "origin")
    shutil.copytree(lora, files.folder("tuned") / "checkpoint-1")
    shutil.copytree(lora, files.folder("base") / "unused")
    files.server_close()
    with serving(tmp_path / "origin") as origin:
        config = write_config(origin, tmp_path / "pod", "tuned", base_model=str(base))
        running = start_pod(config, environment={"VLLM_CPU_KVCACHE_SPACE": "1"})
        try:
            running.wait_ready()
            models = running.get("/v1/models").json()["data"]
        finally:
            running.close()
    assert [model["id"] for model in models] == ["base"]
    assert "merge: vLLM would not serve all of tuned" in running.text()
    (out,) = (tmp_path / "pod").rglob("merge-*/podloader.json")
    assert json.loads(out.read_text())["kind"] == "merged"
