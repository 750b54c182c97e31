"""vLLM in process: answers, adapters, streams, many at once, bad requests, bad starts."""

from __future__ import annotations

import asyncio
import threading
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import psutil
import pytest

from loader.errors import ConfigError, EngineError, RequestError
from loader.serve.transformers import TransformersModel
from loader.serve.vllm.inprocess import VLLMModel
from loader.types import ReadyModel
from tests.serve.test_transformers import MESSAGES, PROMPT, events_of

pytestmark = pytest.mark.engine
NAMES = ("base", "red", "job.blue")


def greedy(**more: Any) -> dict[str, Any]:
    return {"model": "base", "prompt": PROMPT, "temperature": 0, "max_tokens": 12} | more


async def choice_of(model: VLLMModel | TransformersModel, body: dict[str, Any]) -> dict[str, Any]:
    answer = await model.predict(body)
    assert isinstance(answer, dict)
    assert answer["model"] == body["model"]
    choice: dict[str, Any] = answer["choices"][0]
    return choice


@pytest.mark.parametrize("name", NAMES)
async def test_both_engines_say_the_same(
    vllm_model: VLLMModel, transformers_model: TransformersModel, name: str
) -> None:
    for body in (
        greedy(model=name),
        greedy(model=name, ignore_eos=True, max_tokens=60),
        {"model": name, "messages": MESSAGES, "temperature": 0, "max_tokens": 12},
        greedy(model=name, prompt=[5, 6, 7]),
        greedy(model=name, repetition_penalty=1.4),
    ):
        ours = await choice_of(transformers_model, body)
        theirs = await choice_of(vllm_model, body)
        for key in ("text", "finish_reason"):
            assert ours.get(key) == theirs.get(key), body
        assert ours.get("message", {}).get("content") == theirs.get("message", {}).get("content")


def test_the_engine_is_a_fork_of_the_process_that_has_imported_vllm(vllm_model: VLLMModel) -> None:
    (core,) = (child for child in active_children() if child.name == "EngineCore")
    server = psutil.Process(core.pid).parent()
    assert server is not None
    assert "forkserver" in " ".join(server.cmdline())
    assert "loader.serve.vllm.preloaded" in " ".join(server.cmdline())
    (worker,) = psutil.Process(core.pid).children()
    assert worker.cmdline() == server.cmdline()


async def test_streams_say_the_same(vllm_model: VLLMModel) -> None:
    whole = (await choice_of(vllm_model, greedy(model="red")))["text"]
    events = await events_of(vllm_model, greedy(model="red"))
    assert "".join(event["choices"][0]["text"] for event in events) == whole
    assert len(events) > 2
    chat = await events_of(vllm_model, {"model": "red", "messages": MESSAGES, "max_tokens": 3})
    assert chat[0]["choices"][0]["delta"]["role"] == "assistant"


async def test_many_at_once_are_not_crossed(vllm_model: VLLMModel) -> None:
    """Guards against vLLM's CPU kernels answering base requests with the last adapter."""
    alone = {name: (await choice_of(vllm_model, greedy(model=name)))["text"] for name in NAMES}
    assert len(set(alone.values())) == len(NAMES)
    asked = [NAMES[i % 3] for i in range(120)]
    together = await asyncio.gather(*(choice_of(vllm_model, greedy(model=n)) for n in asked))
    assert [choice["text"] for choice in together] == [alone[name] for name in asked]


def test_any_loop_will_do(vllm_model: VLLMModel) -> None:
    texts: list[str] = []

    def ask() -> None:
        texts.append(asyncio.run(choice_of(vllm_model, greedy()))["text"])

    for _ in range(2):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert len(texts) == 2
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (greedy(max_tokens=-1), 400, "max_tokens must be at least 1"),
        (greedy(max_tokens="many"), 400, "max_tokens: Input should be a valid integer"),
        (greedy(temperature=-3), 400, "temperature must be non-negative"),
        (greedy(prompt="x " * 3000), 400, "maximum context length"),
        (greedy(prompt=[10**9]), 400, "out of vocabulary"),
        ({"model": "base", "messages": []}, 400, "empty conversation"),
        ({"model": "base", "messages": [{"role": "user", "content": 3}]}, 400, "content"),
        (greedy(model="absent"), 404, "does not exist"),
        (greedy(messages=MESSAGES), 400, "either messages or prompt"),
    ],
)
async def test_bad_requests_leave_the_engine_well(
    vllm_model: VLLMModel, body: dict[str, Any], status: int, message: str
) -> None:
    for stream in (False, True):
        with pytest.raises(RequestError, match=message) as error:
            await vllm_model.predict(body | {"stream": stream})
        assert error.value.status == status
    assert vllm_model.is_healthy()
    assert (await choice_of(vllm_model, greedy(max_tokens=1)))["finish_reason"] == "length"


async def unfinished(model: VLLMModel, wanted: int) -> int:
    """Return vLLM's count of requests under way, waiting a little for *wanted*."""
    running: Any = model._running
    for _ in range(200):
        count = int(running.engine.get_num_unfinished_requests())
        if count == wanted:
            break
        await asyncio.sleep(0.01)
    return count


async def test_closing_a_stream_aborts_the_request(vllm_model: VLLMModel) -> None:
    stream: Any = await vllm_model.predict(greedy(max_tokens=240, ignore_eos=True, stream=True))
    await anext(stream)
    assert await unfinished(vllm_model, 1) == 1
    await stream.aclose()
    assert await unfinished(vllm_model, 0) == 0


async def test_cancelling_a_call_aborts_the_request(vllm_model: VLLMModel) -> None:
    call = asyncio.create_task(vllm_model.predict(greedy(max_tokens=240, ignore_eos=True)))
    assert await unfinished(vllm_model, 1) == 1
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    assert await unfinished(vllm_model, 0) == 0


async def test_load_again_does_nothing(vllm_model: VLLMModel) -> None:
    before = vllm_model._running
    await asyncio.to_thread(vllm_model.load)
    assert vllm_model._running is before


def test_unknown_engine_argument(plain: ReadyModel, small_cache: None) -> None:
    with pytest.raises(ConfigError) as error:
        VLLMModel(plain, engine_args={"max_modle_len": 1}).load()
    assert "'max_model_len'" in error.value.problems[0]


def test_a_start_that_fails(broken_folder: Path, small_cache: None) -> None:
    model = VLLMModel(broken_folder)
    with pytest.raises(EngineError, match="vLLM did not start") as error:
        model.load()
    assert "nonsense" in error.value.got
    assert error.value.__cause__ is not None
    assert not model.is_healthy()


async def test_not_loaded(plain: ReadyModel) -> None:
    model = VLLMModel(plain)
    with pytest.raises(EngineError, match="not running"):
        await model.predict(greedy())
    model.close()
