"""The canary: an adapter that the engine does not take up is found before readiness.

With vLLM, too: ``test_live.py``, which adds a silent adapter to the engine that all tests share,
and ``tests/pod/test_serving.py``, whose last pod has one from the start.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loader.errors import AdapterError
from loader.serve.canary import Ask, Said, check_adapters, distance
from loader.serve.transformers import TransformersModel
from loader.serve.vllm.inprocess import VLLMModel
from loader.types import ReadyModel, ServedAdapter
from tests.serve.conftest import ENGINE_ARGS


def ask_of(answers: Mapping[str, list[Said]]) -> Ask:
    """Return what gives each name's answers in turn, the last one for ever."""

    async def ask(name: str) -> Said:
        return answers[name].pop(0) if len(answers[name]) > 1 else answers[name][0]

    return ask


def said(*logprobs: float, tokens: str = "abc") -> Said:
    return Said(tuple(tokens), logprobs)


async def test_every_silent_adapter_is_named() -> None:
    same, other = said(-1, -2, -3), said(-1, -2.5, -3)
    ask = ask_of({"base": [same], "a": [same], "b": [other], "c": [same]})
    with pytest.raises(AdapterError, match="change nothing") as error:
        await check_adapters(ask, "base", ["a", "b", "c"])
    assert error.value.problems == ("a", "c")


async def test_noise_is_no_effect() -> None:
    noisy = [said(-1.0, -2), said(-1.1, -2)]
    with pytest.raises(AdapterError):
        await check_adapters(ask_of({"base": noisy * 9, "a": [said(-1.05, -2)]}), "base", ["a"])
    await check_adapters(ask_of({"base": noisy * 9, "a": [said(-1.3, -2)]}), "base", ["a"])
    await check_adapters(ask_of({}), "base", [])


async def test_a_moment_of_noise_is_waited_out() -> None:
    base = [said(-1.0), said(-1.1), said(-1.0)]
    await check_adapters(ask_of({"base": base, "a": [said(-1.05)]}), "base", ["a"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spoiled", ["base", "b"])
async def test_no_number_is_neither_a_change_nor_none(value: float, spoiled: str) -> None:
    answers = {"base": [said(-1, -2)], "a": [said(-1, -2.5)], "b": [said(-1, -3)]}
    answers[spoiled] = [said(-1, value)]
    with pytest.raises(AdapterError, match="no numbers") as error:
        await check_adapters(ask_of(answers), "base", ["a", "b"])
    assert error.value.problems == (spoiled,)


def test_what_follows_another_token_is_not_compared() -> None:
    assert distance(said(-1, -2, -3), said(-1, -2.5, -30, tokens="axc")) == 0.5
    assert distance(said(-1, -2, -3), said(-1, -2, -3)) == 0


def make_silent(source: Path, folder: Path) -> Path:
    """Make an adapter like that of *source* whose products are zero, which no header shows."""
    folder.mkdir(parents=True)
    tensors = load_file(source / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        tensor.zero_()
        tensor[0 if "lora_A" in name else slice(None), slice(None) if "lora_A" in name else 1] = 1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config))
    product = [tensors[n.replace("lora_A", "lora_B")] @ t for n, t in tensors.items() if "_A" in n]
    assert not any(torch.count_nonzero(p) for p in product)
    return folder


def silent(ready: ReadyModel, folder: Path) -> ReadyModel:
    """Return the base with a silent adapter."""
    make_silent(ready.adapters[0].path, folder)
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
def test_vllm(ready: ReadyModel, small_cache: None, tmp_path: Path) -> None:
    """``load`` ends with the canary's error, and the engine with it."""
    before = engines()
    model = VLLMModel(silent(ready, tmp_path / "silent"), engine_args=ENGINE_ARGS)
    with pytest.raises(AdapterError, match="change nothing") as error:
        model.load()
    assert error.value.problems == ("silent",)
    assert not model.is_healthy()
    for _ in range(100):  # vLLM kills its engine and does not wait for it
        if engines() == before:
            break
        time.sleep(0.1)
    assert engines() == before


def engines() -> list[int | None]:
    """Return vLLM's engines that this process has started, and that live."""
    return [child.pid for child in active_children() if child.name == "EngineCore"]
