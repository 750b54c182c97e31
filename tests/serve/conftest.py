"""One base with two adapters, and one engine of each sort over it for the whole session."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from loader.serve.transformers import TransformersModel
from loader.serve.vllm.inprocess import VLLMModel
from loader.types import ReadyModel, ServedAdapter
from tests.models import tiny_llama, train_or_draw_lora

# One slot for requests without an adapter, two for the adapters, two for those that come later.
ENGINE_ARGS = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "max_loras": 5}


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> ReadyModel:
    """A tiny Llama with the adapters ``red`` and ``job.blue``, which answer unlike it."""
    root = tmp_path_factory.mktemp("ready")
    base = tiny_llama(root / "base")
    red = train_or_draw_lora(base, root / "red", seed=1, spread=0.3)
    blue = train_or_draw_lora(base, root / "blue", seed=2, spread=0.3, r=8)
    adapters = (ServedAdapter("red", red, 4), ServedAdapter("job.blue", blue, 8))
    return ReadyModel(base, adapters, 8, base, {})


@pytest.fixture(scope="session")
def plain(ready: ReadyModel) -> ReadyModel:
    """The base alone."""
    return ReadyModel(ready.path, (), None, ready.path, {})


@pytest.fixture(scope="session")
def small_cache() -> None:
    """What keeps vLLM's CPU build from taking half the machine's memory for its cache."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest_asyncio.fixture(scope="session")
async def vllm_model(ready: ReadyModel, small_cache: None) -> AsyncIterator[VLLMModel]:
    """vLLM over base and adapters, loaded as Truss does: in a thread that is not the main one."""
    model = VLLMModel(ready, engine_args=ENGINE_ARGS, served_model_name="base")
    await asyncio.to_thread(model.load)
    yield model
    await asyncio.to_thread(model.close)


@pytest_asyncio.fixture(scope="session")
async def transformers_model(ready: ReadyModel) -> AsyncIterator[TransformersModel]:
    """transformers over base and adapters."""
    model = TransformersModel(ready, engine_args=ENGINE_ARGS, served_model_name="base")
    await asyncio.to_thread(model.load)
    yield model
    model.close()


@pytest.fixture
def broken_folder(tmp_path: Path) -> Path:
    """A folder whose config.json names no architecture that anything knows."""
    (tmp_path / "config.json").write_text('{"model_type": "nonsense", "architectures": ["No"]}')
    return tmp_path
