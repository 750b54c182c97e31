"""Every tensor of an adapter is used by vLLM, or nothing starts with it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    FalconConfig,
    GPT2Config,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from loader.adapters.attach import Decision, NamedAdapter
from loader.adapters.layers import Reason, reconsider
from loader.errors import AdapterError, EngineError, LoaderError
from loader.serve.vllm.forkserver import METHOD, ask_forked
from loader.serve.vllm.inprocess import VLLMModel
from loader.types import ReadyModel, ServedAdapter
from tests.models import tiny_llama, train_or_draw_lora

SMALL = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2}
_NO_LORA, _LEFT_OUT = "no LoRA for", "leave out"
# What vLLM 0.32 leaves out, or cannot begin with.
UNUSED: Mapping[str, tuple[PreTrainedConfig, str, str, str]] = {
    "gpt2": (GPT2Config(n_embd=64, n_layer=2, n_head=2), "transformer.h.0", "c_attn", _NO_LORA),
    "falcon": (FalconConfig(**SMALL), "transformer.h.0.mlp", "dense_h_to_4h", _NO_LORA),
    "mamba": (MambaConfig(**SMALL), "backbone", "embeddings", f"{_NO_LORA}|{_LEFT_OUT}"),
    # Its CPU build has no LoRA for experts at all.
    "experts": (
        MixtralConfig(**TEXT, num_local_experts=4),
        "model.layers.0.mlp",
        "experts",
        f"kernel not supported|{_LEFT_OUT}",
    ),
    "names without the head's": (
        Qwen2Config(**TEXT),
        "layers.0.self_attn",
        "q_proj",
        _LEFT_OUT,
    ),
}


def make_config(folder: Path, config: PreTrainedConfig) -> Path:
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    names = AutoModelForCausalLM._model_mapping[type(config)].__name__
    document = config.to_dict() | {"architectures": [names]}
    (folder / "config.json").write_text(json.dumps(document, default=str))
    return folder


def tensors(path: str, module: str) -> list[str]:
    return [f"base_model.model.{path}.{module}.lora_{side}.weight" for side in "AB"]


@pytest.mark.engine
@pytest.mark.parametrize("case", UNUSED)
def test_what_it_would_leave_out_is_told_before_anything_is_loaded(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(METHOD, raising=False)
    config, path, module, expected = UNUSED[case]
    told = ask_forked(make_config(tmp_path / "model", config), {}, {"mine": tensors(path, module)})
    assert list(told) == ["mine"]
    text, certain = told["mine"]
    assert re.search(expected, text)
    assert certain is (case != "experts")


@pytest.mark.engine
def test_nothing_is_told_of_what_it_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(METHOD, raising=False)
    names = [
        *tensors("model.layers.1.mlp", "up_proj"),
        *tensors("model.layers.0.self_attn", "v_proj"),
    ]
    model = make_config(tmp_path / "model", Qwen2Config(**TEXT))
    assert ask_forked(model, {}, {"a": names, "b": names}) == {}
    odd = [*names, *tensors("model.visual.blocks.0.attn", "qkv")]
    assert list(ask_forked(model, {}, {"a": names, "b": odd})) == ["b"]


def adapter_with_odd_names(base: Path, folder: Path) -> Path:
    """An adapter of which one layer bears a name that vLLM drops without a word."""
    train_or_draw_lora(base, folder, spread=0.3)
    file = folder / "adapter_model.safetensors"
    named = {
        n.replace("model.model.layers.1", "model.layers.1"): t for n, t in load_file(file).items()
    }
    save_file(named, file)
    return folder


@pytest.mark.engine
def test_a_worker_refuses_what_it_would_use_in_part(tmp_path: Path, small_cache: None) -> None:
    base = tiny_llama(tmp_path / "base")
    odd = adapter_with_odd_names(base, tmp_path / "odd")
    good = train_or_draw_lora(base, tmp_path / "good", spread=0.3)
    settings = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, "max_loras": 4}
    alone = ReadyModel(base, (ServedAdapter("odd", odd, 4),), 8, base, {})
    with pytest.raises(EngineError, match=r"no layer for 2 of 4 modules"):
        VLLMModel(alone, engine_args=settings).load()
    model = VLLMModel(
        ReadyModel(base, (ServedAdapter("good", good, 4),), 8, base, {}), engine_args=settings
    )
    model.load()
    try:
        with pytest.raises(LoaderError, match=r"no layer for 2 of 4 modules"):
            model.add_adapter(ServedAdapter("odd", odd, 4))
        assert model.is_healthy()
        assert [adapter.name for adapter in model.adapters] == ["good"]
    finally:
        model.close()


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path, Path]:
    base = tiny_llama(tmp_path / "base")
    plain = train_or_draw_lora(base, tmp_path / "plain")
    head = train_or_draw_lora(base, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    return base, plain, head


def test_an_adapter_is_merged_where_it_would_be_left_out(llama: tuple[Path, Path, Path]) -> None:
    base, plain, head = llama
    asked: list[Any] = []

    def ask(model: Path, names: Mapping[str, Any]) -> Mapping[str, Reason]:
        asked.append((model, list(names)))
        return dict.fromkeys(names, ("1 module that it would leave out", True))

    def unsure(_: Path, names: Mapping[str, Any]) -> Mapping[str, Reason]:
        return dict.fromkeys(names, ("it could not be built", False))

    attach = Decision("attach", "attach")
    ours, theirs = NamedAdapter("plain", plain), NamedAdapter("head", head)
    assert reconsider(attach, "auto", [ours], base, ask) is attach
    assert not asked  # every vLLM has these layers
    merged = reconsider(attach, "auto", [theirs], base, ask)
    assert merged.mode == "merge"
    assert "leave out" in merged.why
    assert asked == [(base, ["head"])]
    for policy, adapters in (("attach", [theirs]), ("auto", [ours, theirs])):
        with pytest.raises(AdapterError, match="would not serve in full"):
            reconsider(attach, policy, adapters, base, ask)  # type: ignore[arg-type]
    assert reconsider(attach, "auto", [theirs], base, lambda *_: {}) is attach
    # Where vLLM cannot say it, its workers will; a merge is right whatever they would say.
    assert reconsider(attach, "auto", [theirs], base, unsure).mode == "merge"
    assert reconsider(attach, "attach", [theirs], base, unsure) is attach
    assert reconsider(attach, "auto", [ours, theirs], base, unsure) is attach


def test_without_vllm_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(os.environ, METHOD, "spawn")
    monkeypatch.setattr("loader.serve.vllm.forkserver._started.is_set", lambda: False)
    assert ask_forked(tmp_path, {}, {"a": ["b"]}) == {}
