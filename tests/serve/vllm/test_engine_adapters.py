"""Adapters that come, change and go while the engine answers."""

from __future__ import annotations

import asyncio
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from loader.errors import AdapterError, EngineError, RequestError
from loader.pod.live_adapters import LiveAdapters
from loader.serve.vllm.inprocess import VLLMModel
from loader.types import ReadyModel, ServedAdapter
from tests.models import train_or_draw_lora
from tests.origin import FaultyOrigin
from tests.serve.test_canary import silent
from tests.serve.test_transformers import PROMPT, events_of, expected_text
from tests.test_boot import Job

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def versions(ready: ReadyModel, tmp_path_factory: pytest.TempPathFactory) -> list[ServedAdapter]:
    """Two adapters that bear one name."""
    root = tmp_path_factory.mktemp("versions")
    folders = [
        train_or_draw_lora(ready.path, root / f"v{seed}", seed=seed, spread=0.3) for seed in (7, 8)
    ]
    return [ServedAdapter("job.green", folder, 4) for folder in folders]


@pytest_asyncio.fixture
async def model(vllm_model: VLLMModel) -> Any:
    """The session's engine, left as it was."""
    before = vllm_model.names
    yield vllm_model
    for name in set(vllm_model.names) - set(before):
        await asyncio.to_thread(vllm_model.remove_adapter, name)
    assert vllm_model.names == before


def expected(ready: ReadyModel, adapter: ServedAdapter, tokens: int = 12) -> str:
    one = ReadyModel(ready.path, (adapter,), 8, ready.path, {})
    return expected_text(one, adapter.name, tokens=tokens)


async def ask(model: VLLMModel, name: str, prompt: str = PROMPT) -> str:
    body = {"model": name, "prompt": prompt, "temperature": 0, "max_tokens": 12}
    answer = await model.predict(body)
    assert isinstance(answer, dict)
    assert answer["model"] == name
    return str(answer["choices"][0]["text"])


async def in_the_engine(model: VLLMModel, count: int) -> bool:
    """Return whether the engine holds *count* versions of adapters, or does so soon."""
    running: Any = model._running
    for _ in range(100):
        held = await running.loop.run(running.engine.list_loras())
        if len(held) == count:
            return True
        await asyncio.sleep(0.05)
    return False


async def test_added_replaced_removed(
    model: VLLMModel, ready: ReadyModel, versions: list[ServedAdapter]
) -> None:
    first, second = versions
    base = await ask(model, "base")
    await asyncio.to_thread(model.add_adapter, first)
    assert "job.green" in model.names
    assert await ask(model, "job.green") == expected(ready, first)
    with pytest.raises(RequestError, match="served already") as error:
        await asyncio.to_thread(model.add_adapter, second)
    assert error.value.status == 409
    await asyncio.to_thread(model.add_adapter, second, replace=True)
    assert await ask(model, "job.green") == expected(ready, second) != expected(ready, first)
    assert await in_the_engine(model, 3)
    await asyncio.to_thread(model.remove_adapter, "job.green")
    assert await in_the_engine(model, 2)
    for call in (ask(model, "job.green"), asyncio.to_thread(model.remove_adapter, "job.green")):
        with pytest.raises(RequestError) as error:
            await call
        assert error.value.status == 404
    assert await ask(model, "base") == base


async def test_requests_under_way_keep_the_adapter_they_began_with(
    model: VLLMModel, ready: ReadyModel, versions: list[ServedAdapter]
) -> None:
    first, second = versions
    await asyncio.to_thread(model.add_adapter, first)
    body = {"model": "job.green", "prompt": PROMPT, "temperature": 0, "ignore_eos": True}
    alone = await events_of(model, body | {"max_tokens": 200})
    whole = "".join(event["choices"][0]["text"] for event in alone)
    under_way = [
        asyncio.create_task(events_of(model, body | {"max_tokens": 200})) for _ in range(4)
    ]
    await asyncio.sleep(0.1)
    await asyncio.to_thread(model.add_adapter, second, replace=True)
    fresh = [asyncio.create_task(ask(model, "job.green")) for _ in range(8)]
    assert not any(task.done() for task in under_way), "too quick to tell"
    assert await in_the_engine(model, 4)
    assert {await task for task in fresh} == {expected(ready, second)}
    for task in under_way:
        events = await task
        assert {event["model"] for event in events} == {"job.green"}
        assert "".join(event["choices"][0]["text"] for event in events) == whole
    del under_way, task  # an error would hold on to what was answered
    assert await in_the_engine(model, 3)


async def test_what_is_refused_leaves_the_engine_as_it_was(
    model: VLLMModel, ready: ReadyModel, versions: list[ServedAdapter], tmp_path: Path
) -> None:
    before = await ask(model, "base")
    quiet = silent(ready, tmp_path / "silent").adapters[0]
    with pytest.raises(AdapterError, match="change nothing"):
        await asyncio.to_thread(model.add_adapter, quiet)
    wide = train_or_draw_lora(ready.path, tmp_path / "wide", r=64)
    for path in (wide, tmp_path / "absent"):
        with pytest.raises(AdapterError, match="does not take"):
            await asyncio.to_thread(model.add_adapter, ServedAdapter("x", path, 64))
    with pytest.raises(RequestError, match="base model"):
        await asyncio.to_thread(model.add_adapter, ServedAdapter("base", wide, 64))
    assert await in_the_engine(model, 2)
    assert await ask(model, "base") == before


@pytest.mark.parametrize(
    ("factor", "why"), [(math.nan, "NaN or infinite"), (1e30, "no numbers|change nothing")]
)
async def test_an_adapter_of_nan_is_refused_and_spoils_nobody(
    model: VLLMModel, versions: list[ServedAdapter], tmp_path: Path, factor: float, why: str
) -> None:
    """With 1e30 every value is finite, and what they compute is not."""
    before = await ask(model, "base")
    spoiled = tmp_path / "nan"
    shutil.copytree(versions[0].path, spoiled)
    weights = spoiled / "adapter_model.safetensors"
    save_file({n: t * factor for n, t in load_file(weights).items()}, weights)
    for _ in range(4):  # in whichever slot it was
        with pytest.raises(AdapterError, match=why):
            await asyncio.to_thread(model.add_adapter, ServedAdapter("job.nan", spoiled, 4))
        answers = await asyncio.gather(*(ask(model, n) for n in ("base", "red", "base", "red")))
        assert answers[0] == answers[2] == before
    assert "job.nan" not in model.names


async def test_files_that_change_change_no_version(
    model: VLLMModel, ready: ReadyModel, versions: list[ServedAdapter], tmp_path: Path
) -> None:
    """More adapters than the engine has room for: it reads them again and again."""
    folder = tmp_path / "one"
    shutil.copytree(versions[0].path, folder)
    await asyncio.to_thread(model.add_adapter, ServedAdapter("job.green", folder, 4))
    long = "one two three " * 12  # several blocks of the cache
    old = [await ask(model, "job.green", prompt) for prompt in (PROMPT, long)]
    assert old[0] == expected(ready, versions[0])
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes((versions[1].path / weights.name).read_bytes())
    names = [f"n{i}" for i in range(6)]
    for name in names:
        await asyncio.to_thread(model.add_adapter, ServedAdapter(name, versions[1].path, 4))
    new = expected(ready, versions[1])
    assert set(await asyncio.gather(*(ask(model, name) for name in names))) == {new}
    assert await ask(model, "job.green") == old[0]
    fresh = await ask(model, names[0], long)
    await asyncio.to_thread(model.remove_adapter, "job.green")
    await asyncio.to_thread(model.add_adapter, ServedAdapter("job.green", folder, 4))
    assert await ask(model, "job.green", long) == fresh != old[1]


async def test_from_a_training_checkpoint(
    model: VLLMModel,
    ready: ReadyModel,
    versions: list[ServedAdapter],
    origin: FaultyOrigin,
    tmp_path: Path,
) -> None:
    job = Job(origin, tmp_path)
    for number, version in enumerate(versions):
        job.put(version.path, f"checkpoint-{number}")
    live = LiveAdapters(model, ready.path, job.settings("rank-0/"))
    arrived = await asyncio.wrap_future(live.add("job1", "rank-0/checkpoint-0/"))
    assert arrived.name == "job1/checkpoint-0"
    assert await ask(model, arrived.name) == expected(ready, versions[0])
    await asyncio.wrap_future(live.replace(arrived.name, "job1", "rank-0/checkpoint-1/"))
    assert await ask(model, arrived.name) == expected(ready, versions[1])
    assert [a.name for a in live.list()] == ["red", "job.blue", arrived.name]
    await asyncio.to_thread(live.remove, arrived.name)
    live.close()


def test_not_running(ready: ReadyModel, versions: list[ServedAdapter]) -> None:
    model = VLLMModel(ready)
    with pytest.raises(EngineError, match="not running"):
        model.add_adapter(versions[0])
    assert [adapter.name for adapter in model.adapters] == ["red", "job.blue"]
