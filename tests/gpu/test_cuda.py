"""Merged and attached checkpoints on a GPU say what they say on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loader.adapters.merge import WeightedAdapter, merge
from loader.serve.transformers import TransformersModel
from loader.types import ReadyModel, ServedAdapter
from tests.models import tiny_llama, train_or_draw_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no CUDA device: torch.cuda.is_available() is False",
    ),
]
PROMPTS = ["the capital of france", "0 1 2 3", "what is"]


@pytest.fixture(scope="module", params=["attached", "merged"])
def ready(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ReadyModel:
    """One adapter over one base, made ready in both ways."""
    root = tmp_path_factory.mktemp("models")
    base = tiny_llama(root / "base")
    lora = train_or_draw_lora(base, root / "lora", spread=0.3)
    if request.param == "merged":
        return merge(base, [WeightedAdapter(lora)], root / "merged")
    return ReadyModel(base, (ServedAdapter("lora", lora, 4),), 8, base, {})


@pytest.fixture(scope="module")
def models(ready: ReadyModel) -> Iterator[dict[str, TransformersModel]]:
    """The same model on both devices."""
    found = {}
    for device in ("cpu", "cuda"):
        found[device] = TransformersModel(
            ready, engine_args={"dtype": "float32"}, served_model_name="base", device=device
        )
        found[device].load()
    yield found
    for model in found.values():
        model.close()


async def texts_of(model: TransformersModel, name: str) -> list[str]:
    body = {"model": name, "prompt": PROMPTS, "temperature": 0, "max_tokens": 32}
    answer: Any = await model.predict(body)
    return [choice["text"] for choice in answer["choices"]]


async def test_greedy_tokens_are_the_cpu_s(models: dict[str, TransformersModel]) -> None:
    for name in models["cpu"].names:
        expected = await texts_of(models["cpu"], name)
        assert await texts_of(models["cuda"], name) == expected


async def test_the_weights_are_on_the_gpu(models: dict[str, TransformersModel]) -> None:
    loaded = models["cuda"]._loaded
    assert loaded is not None
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {"cuda"}


async def test_an_attached_adapter_answers_unlike_its_base(
    models: dict[str, TransformersModel],
) -> None:
    texts = [await texts_of(models["cuda"], name) for name in models["cuda"].names]
    assert len({tuple(text) for text in texts}) == len(texts)
