"""The transformers engine against transformers and PEFT themselves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loader.errors import ConfigError, EngineError, RequestError
from loader.serve.transformers import TransformersModel
from loader.types import ReadyModel

PROMPT = "the capital of france"
MESSAGES = [{"role": "user", "content": "what is the capital?"}]


def greedy(**more: Any) -> dict[str, Any]:
    return {"model": "base", "prompt": PROMPT, "temperature": 0, "max_tokens": 12} | more


async def text_of(model: TransformersModel, body: dict[str, Any]) -> str:
    answer = await model.predict(body)
    assert isinstance(answer, dict)
    return str(answer["choices"][0].get("text") or answer["choices"][0]["message"]["content"])


async def events_of(model: Any, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parsed events of a stream, checked to be well-formed and ended."""
    stream = await model.predict(body | {"stream": True})
    assert isinstance(stream, AsyncIterator)
    raw = [event async for event in stream]
    assert all(event.startswith("data: ") and event.endswith("\n\n") for event in raw)
    assert raw.pop() == "data: [DONE]\n\n"
    return [json.loads(event.removeprefix("data: ")) for event in raw]


def expected_text(ready: ReadyModel, adapter: str | None, *, tokens: int = 12) -> str:
    """Return what transformers and PEFT say, used as their own documents show."""
    model: Any = AutoModelForCausalLM.from_pretrained(ready.path)
    paths = {a.name: a.path for a in ready.adapters}
    if adapter is not None:
        model = PeftModel.from_pretrained(model, paths[adapter])
    tokenizer = AutoTokenizer.from_pretrained(ready.tokenizer)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        out = model.generate(input_ids=ids, do_sample=False, max_new_tokens=tokens)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("name", ["base", "red", "job.blue"])
async def test_greedy_text_is_that_of_the_libraries(
    transformers_model: TransformersModel, ready: ReadyModel, name: str
) -> None:
    expected = expected_text(ready, None if name == "base" else name)
    assert await text_of(transformers_model, greedy(model=name)) == expected


async def test_many_at_once_over_adapters_are_not_crossed(
    transformers_model: TransformersModel,
) -> None:
    names = ["base", "red", "job.blue"]
    alone = {name: await text_of(transformers_model, greedy(model=name)) for name in names}
    assert len(set(alone.values())) == 3
    asked = [names[i % 3] for i in range(12)]
    together = await asyncio.gather(
        *(text_of(transformers_model, greedy(model=name)) for name in asked)
    )
    assert together == [alone[name] for name in asked]


async def test_shape_and_usage(transformers_model: TransformersModel) -> None:
    answer: Any = await transformers_model.predict(greedy(prompt=[PROMPT, [5, 6, 7]]))
    assert answer["object"] == "text_completion"
    assert answer["model"] == "base"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert all(choice["finish_reason"] in ("stop", "length") for choice in answer["choices"])


async def test_chat_uses_the_template(transformers_model: TransformersModel) -> None:
    text = "<|user|>what is the capital?<|end|><|assistant|>"
    chat: Any = await transformers_model.predict(
        {"model": "red", "messages": MESSAGES, "temperature": 0, "max_tokens": 9}
    )
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"]["role"] == "assistant"
    same = await text_of(transformers_model, greedy(model="red", prompt=text, max_tokens=9))
    assert chat["choices"][0]["message"]["content"] == same


async def test_stream_says_the_same(transformers_model: TransformersModel) -> None:
    whole = await text_of(transformers_model, greedy())
    events = await events_of(transformers_model, greedy(stream_options={"include_usage": True}))
    assert "".join(e["choices"][0]["text"] for e in events if e["choices"]) == whole
    assert sum(1 for e in events if e["choices"]) > 2
    assert events[-1]["usage"]["completion_tokens"] == 12


async def test_chat_stream_opens_with_the_role(transformers_model: TransformersModel) -> None:
    events = await events_of(
        transformers_model, {"model": "base", "messages": MESSAGES, "max_tokens": 3}
    )
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[0]["object"] == "chat.completion.chunk"
    assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")


async def test_stop_string_ends_and_is_left_out(transformers_model: TransformersModel) -> None:
    whole = await text_of(transformers_model, greedy(max_tokens=40, ignore_eos=True))
    stop = whole[6:9]
    body = greedy(max_tokens=40, ignore_eos=True, stop=["never there", stop])
    answer: Any = await transformers_model.predict(body)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["text"] == whole[: whole.find(stop)]
    events = await events_of(transformers_model, body)
    assert "".join(e["choices"][0]["text"] for e in events) == whole[: whole.find(stop)]


async def test_sampling_repeats_with_a_seed(transformers_model: TransformersModel) -> None:
    body = greedy(temperature=5.0, seed=7)
    texts = {await text_of(transformers_model, body) for _ in range(3)}
    assert len(texts) == 1
    assert await text_of(transformers_model, body | {"seed": 8}) not in texts


async def test_a_closed_stream_stops_generating(transformers_model: TransformersModel) -> None:
    long = greedy(max_tokens=240, ignore_eos=True)
    began = time.monotonic()
    await text_of(transformers_model, long)
    whole_s = time.monotonic() - began
    stream: Any = await transformers_model.predict(long | {"stream": True})
    await anext(stream)
    await stream.aclose()
    # Requests are answered in turn: had the first gone on, the next would wait for it.
    began = time.monotonic()
    await text_of(transformers_model, greedy(max_tokens=1))
    assert time.monotonic() - began < whole_s / 2


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"prompt": "", "model": "base"}, "empty"),
        ({"prompt": 3, "model": "base"}, "neither text nor token ids"),
        ({"prompt": [99999], "model": "base"}, "out of vocabulary"),
        ({"prompt": PROMPT, "max_tokens": 256, "model": "base"}, "maximum context length"),
        ({"messages": [], "model": "base"}, "something in it"),
        ({"messages": [{"content": "x"}], "model": "base"}, "without a role"),
        ({"messages": [{"role": "user", "content": 3}], "model": "base"}, "content is no text"),
    ],
)
async def test_bad_requests(
    transformers_model: TransformersModel, body: dict[str, Any], problem: str
) -> None:
    with pytest.raises(RequestError, match=problem) as error:
        await transformers_model.predict(body)
    assert error.value.status == 400


@pytest.mark.parametrize("engine_args", [{"dtype": "int3"}, {"max_model_len": -1}])
def test_bad_engine_args(plain: ReadyModel, engine_args: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        TransformersModel(plain, engine_args=engine_args).load()


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model folder"):
        TransformersModel(tmp_path)


def test_a_model_that_nothing_knows(broken_folder: Path) -> None:
    with pytest.raises(EngineError, match="did not load") as error:
        TransformersModel(broken_folder).load()
    assert "nonsense" in error.value.got


async def test_life(plain: ReadyModel) -> None:
    model = TransformersModel(plain)
    with pytest.raises(EngineError, match="not running"):
        await model.predict({"prompt": "x"})
    assert not model.is_healthy()
    model.load()
    model.load()
    assert model.is_healthy()
    model.close()
    model.close()
    assert not model.is_healthy()
