"""The canary: an adapter that the engine does not take up is found before readiness."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loader.errors import AdapterError
from loader.serve.canary import check_adapters
from loader.serve.transformers import TransformersModel
from loader.serve.vllm import VLLMModel
from loader.types import ReadyModel, ServedAdapter
from tests.serve.conftest import ENGINE_ARGS


def ask_of(answers: Mapping[str, list[list[float]]]) -> object:
    async def ask(name: str) -> Sequence[float]:
        return answers[name].pop(0)

    return ask


async def test_every_silent_adapter_is_named() -> None:
    answers = {"base": [[-1.0, -2.0]] * 2, "a": [[-1.0, -2.0]], "b": [[-1.0, -2.5]]}
    answers["c"] = [[-1.0, -2.0]]
    with pytest.raises(AdapterError, match="change nothing") as error:
        await check_adapters(ask_of(answers), "base", ["a", "b", "c"])  # type: ignore[arg-type]
    assert error.value.problems == ("a", "c")


async def test_noise_is_no_effect() -> None:
    answers = {"base": [[-1.0], [-1.1]], "a": [[-1.05]]}
    with pytest.raises(AdapterError):
        await check_adapters(ask_of(answers), "base", ["a"])  # type: ignore[arg-type]
    answers = {"base": [[-1.0], [-1.1]], "a": [[-1.3]]}
    await check_adapters(ask_of(answers), "base", ["a"])  # type: ignore[arg-type]
    await check_adapters(ask_of({}), "base", [])  # type: ignore[arg-type]


def silent(ready: ReadyModel, folder: Path) -> ReadyModel:
    """Return the base with an adapter whose product is zero, which no header shows."""
    folder.mkdir()
    source = ready.adapters[0].path
    tensors = load_file(source / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        tensor.zero_()
        tensor[0 if "lora_A" in name else slice(None), slice(None) if "lora_A" in name else 1] = 1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config))
    product = [tensors[n.replace("lora_A", "lora_B")] @ t for n, t in tensors.items() if "_A" in n]
    assert not any(torch.count_nonzero(p) for p in product)
    return ReadyModel(ready.path, (ServedAdapter("silent", folder, 4),), 8, ready.path, {})


def test_transformers(ready: ReadyModel, tmp_path: Path) -> None:
    quiet = silent(ready, tmp_path / "silent")
    model = TransformersModel(quiet)
    with pytest.raises(AdapterError, match="change nothing") as error:
        model.load()
    assert error.value.problems == ("silent",)
    assert not model.is_healthy()
    model = TransformersModel(quiet, canary=False)
    model.load()
    assert model.is_healthy()
    model.close()


@pytest.mark.engine
async def test_vllm(ready: ReadyModel, small_cache: None, tmp_path: Path) -> None:
    model = VLLMModel(silent(ready, tmp_path / "silent"), engine_args=ENGINE_ARGS)
    with pytest.raises(AdapterError, match="change nothing") as error:
        await asyncio.to_thread(model.load)
    assert error.value.problems == ("silent",)
    assert not model.is_healthy()
