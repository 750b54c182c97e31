"""A pod from its first second to its last, as PID 1; the tests stand in the order of its life."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from loader.serve.transformers import TransformersModel
from loader.types import ReadyModel, ServedAdapter
from tests import origin as faults
from tests.origin import FaultyOrigin
from tests.pod.conftest import JOBS, LATER, LONGEST
from tests.pod.pods import (
    ENGINE_ARGS,
    RunningPod,
    needs_namespaces,
    render,
    start_pod,
    write_config,
)
from tests.serve.test_canary import make_silent

pytestmark = pytest.mark.engine
_REQUESTS = 200
_CUT = "\N{REPLACEMENT CHARACTER}"  # a character that is cut at the end may be left out
_PROMPTS = ["the quick brown", "what is the capital", "a model answers", "0 1 2 3", "plus minus"]


@pytest.fixture(scope="module")
def pod(origin: FaultyOrigin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPod]:
    """One engine over the base and four adapters, ready."""
    needs_namespaces()
    # Broken off a few times, then slow enough to be seen on its way.
    ways = [*[faults.cut(400_000)] * 4, *[faults.slow(0.1)] * 9]
    origin.fail("base/model.safetensors", *ways)
    folder = tmp_path_factory.mktemp("pod")
    engine_args = ENGINE_ARGS | {"max_model_len": LONGEST, "max_loras": 6}
    more = {"adapter_jobs": [LATER], "engine_args": engine_args, "drain_timeout_s": 8}
    config = write_config(origin, folder, *JOBS, later=[LATER], **more)
    running = start_pod(config, environment={"VLLM_CPU_KVCACHE_SPACE": "1"})
    try:
        running.wait_ready()
        yield running
    finally:
        running.close()


@pytest.fixture
def client(pod: RunningPod) -> Iterator[OpenAI]:
    """OpenAI's client; it tries nothing twice, so that a lost request shows."""
    with OpenAI(base_url=f"{pod.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_probes_were_answered_all_along_and_never_refused(pod: RunningPod) -> None:
    statuses = [status for _, status, _ in pod.answers]
    turn = statuses.index(200)
    assert set(statuses[:turn]) == {503}
    assert set(statuses[turn:]) == {200}
    assert pod.refused == []
    bodies = [body for _, _, body in pod.answers[:turn]]
    assert any("engine import" in body["stage"] for body in bodies)
    assert any("engine load" in body["stage"] for body in bodies)
    on_the_way = [body for body in bodies if 0 < body["bytes"]["done"] < body["bytes"]["total"]]
    assert any(body["bytes_per_s"] > 0 and body["left_s"] is not None for body in on_the_way)


def test_the_import_ran_beside_the_download(pod: RunningPod) -> None:
    trace = json.loads((pod.folder / "boot.json").read_text())
    spans = {event["name"]: event for event in trace["traceEvents"] if event["ph"] == "X"}
    engine = {"engine import", "model class", "engine load", "warm-up", "first token", "canary"}
    assert {"resolve", "download"} | engine <= set(spans)
    assert "base/rank-0/base/model.safetensors" in spans
    download, imports = spans["download"], spans["engine import"]
    assert imports["ts"] < download["ts"]
    assert imports["ts"] + imports["dur"] > download["ts"] + download["dur"]
    assert trace["otherData"]["retries"] >= 1
    assert "engine load" in (pod.folder / "boot.svg").read_text()
    assert re.search(r"^ +[\d.]+ +[\d.]+ +engine import", pod.text(), re.MULTILINE)


def test_models_are_the_base_and_its_adapters(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", *JOBS]


def test_chat_and_completions_differ_by_adapter(client: OpenAI) -> None:
    answers = set()
    for model in ("base", *JOBS):
        chat = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "the quick"}],
            max_tokens=12,
            temperature=0,
        )
        text = client.completions.create(
            model=model, prompt="the quick", max_tokens=12, temperature=0
        )
        assert chat.model == text.model == model
        assert chat.choices[0].finish_reason in ("stop", "length")
        answers.add((chat.choices[0].message.content, text.choices[0].text))
    assert len(answers) == 1 + len(JOBS)


def test_a_stream_gives_the_same_text(client: OpenAI) -> None:
    whole = client.completions.create(
        model="joba", prompt="the quick", max_tokens=16, temperature=0
    )
    events = list(
        client.completions.create(
            model="joba", prompt="the quick", max_tokens=16, temperature=0, stream=True
        )
    )
    assert len(events) > 2
    assert "".join(event.choices[0].text for event in events) == whole.choices[0].text


def test_bad_requests_are_refused_and_the_engine_stays_well(
    client: OpenAI, pod: RunningPod
) -> None:
    with pytest.raises(NotFoundError):
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(BadRequestError):
        client.completions.create(model="base", prompt="x", temperature=-1)
    with pytest.raises(BadRequestError):
        client.completions.create(model="base", prompt="x " * LONGEST, max_tokens=5)
    assert pod.get("/health").status_code == 200


def test_a_request_fetches_the_adapter_that_it_names(
    client: OpenAI, pod: RunningPod, origin: FaultyOrigin
) -> None:
    name = f"{LATER}/checkpoint-1"
    assert name not in [model.id for model in client.models.list()]
    assert not (pod.folder / "models" / LATER).exists()
    answers = [
        client.completions.create(model=model, prompt="the quick", max_tokens=12, temperature=0)
        for model in ("base", *JOBS, name, name)
    ]
    assert answers[-1].model == name
    assert answers[-1].choices[0].text == answers[-2].choices[0].text
    assert len({answer.choices[0].text for answer in answers}) == 2 + len(JOBS)
    assert name in [model.id for model in client.models.list()]
    assert (pod.folder / "models" / LATER / "rank-0/checkpoint-1/adapter_config.json").is_file()
    asked = len(origin.requests)
    for absent in ("joba/checkpoint-1", f"{LATER}/../base", f"{LATER}/*", "/etc"):
        with pytest.raises(NotFoundError):
            client.completions.create(model=absent, prompt="x")
    assert len(origin.requests) == asked


async def test_200_concurrent_requests_are_each_answered_by_what_they_ask_for(
    pod: RunningPod, published: Path
) -> None:
    """Base, static and live adapters, among replaces and unloads; told by transformers alone."""
    root = published / "training_projects/demo/jobs"
    folders = {job: root / job / "rank-0/checkpoint-1" for job in (*JOBS, LATER)}
    alone = {
        (job, prompt): text
        for job in ("base", *folders)
        for prompt, text in (await expected_texts(root, folders.get(job))).items()
    }
    for prompt in _PROMPTS:
        assert len({alone[job, prompt] for job in ("base", *folders)}) == len(folders) + 1
    live = f"{LATER}/checkpoint-1"
    over = asyncio.Event()
    async with (
        AsyncOpenAI(base_url=f"{pod.url}/v1", api_key="none", max_retries=0) as client,
        httpx.AsyncClient(base_url=f"{pod.url}/v1", timeout=60) as plain,
    ):

        async def ask(model: str, prompt: str, *weights: str) -> None:
            """The answer must be that of one of *weights*, whole."""
            try:
                answer = await client.completions.create(
                    model=model, prompt=prompt, max_tokens=12, temperature=0
                )
            except NotFoundError:
                assert model == "green"  # which is gone at times
                return
            assert answer.model == model
            text = answer.choices[0].text.rstrip(_CUT)
            assert text
            assert any(alone[job, prompt].startswith(text) for job in weights), model

        async def change(name: str, *paths: str) -> None:
            """Load, replace and unload *name* until all is answered."""
            while not over.is_set():
                for path in paths:
                    body = {"lora_name": name, "lora_path": path, "load_inplace": True}
                    answer = await plain.post("/load_lora_adapter", json=body)
                    assert answer.status_code == 200, answer.text
                if name == "green":
                    answer = await plain.post("/unload_lora_adapter", json={"lora_name": name})
                    assert answer.status_code == 200, answer.text

        static = str(pod.folder / "models/joba/rank-0/checkpoint-1")
        changing = [
            asyncio.create_task(change("green", live, static)),
            asyncio.create_task(change("blue", static, live)),
        ]
        kinds: list[tuple[str, ...]]
        kinds = [("base", "base"), *((job, job) for job in JOBS), (live, LATER)]
        kinds += [("green", LATER, JOBS[0]), ("blue", LATER, JOBS[0])]
        await plain.post("/load_lora_adapter", json={"lora_name": "blue", "lora_path": live})
        asked = [(kinds[i % len(kinds)], _PROMPTS[i % len(_PROMPTS)]) for i in range(_REQUESTS)]
        try:
            await asyncio.gather(*(ask(model, p, *weights) for (model, *weights), p in asked))
        finally:
            over.set()
            await asyncio.gather(*changing)
        await plain.post("/unload_lora_adapter", json={"lora_name": "blue"})
        assert [model.id async for model in client.models.list()] == ["base", *JOBS, live]


async def expected_texts(root: Path, adapter: Path | None) -> dict[str, str]:
    """Return what transformers, which serves that one alone, says to each prompt."""
    base = root / "base/rank-0/base"
    served = (ServedAdapter("a", adapter, 4),) if adapter else ()
    ready = ReadyModel(base, served, 8, base, {})
    model = TransformersModel(ready, served_model_name="base", canary=False)
    model.load()
    name = "a" if adapter else "base"
    body = {"model": name, "max_tokens": 12, "temperature": 0}
    try:
        answers: dict[str, Any] = {p: await model.predict(body | {"prompt": p}) for p in _PROMPTS}
    finally:
        model.close()
    return {p: answer["choices"][0]["text"] for p, answer in answers.items()}


def test_status_and_metrics_go_on_beside_vllms(pod: RunningPod) -> None:
    metrics = pod.get("/metrics").text
    assert "podloader_ready 1.0" in metrics
    assert re.search(r"^podloader_retries_total [1-9]", metrics, re.MULTILINE)
    assert re.search(r"^podloader_ready_seconds [1-9]", metrics, re.MULTILINE)
    assert 'podloader_stage_seconds{stage="engine import"}' in metrics
    assert "vllm:num_requests_running" in metrics
    assert "Ready after" in pod.get("/status").text
    assert pod.get("/status.json").json()["phase"] == "ready"


def test_a_browser_shows_the_page(pod: RunningPod) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    page = render(chromium, f"{pod.url}/status")
    assert "<title>podloader: ready</title>" in page
    assert "Ready after" in page
    assert "engine load" in page


def test_sigterm_lets_requests_end_within_the_limit(pod: RunningPod, client: OpenAI) -> None:
    """The last of this pod."""
    family = [pod.pod, *pod.pod.children(recursive=True)]
    short, endless = (
        client.completions.create(
            model="jobb",
            prompt="the quick",
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for tokens in (50, LONGEST - 100)
    )
    next(iter(short))
    next(iter(endless))
    pod.stop_probing()
    pod.signal(signal.SIGTERM)
    assert list(short)[-1].choices[0].finish_reason == "length"
    late = _asked_until_gone(pod)
    assert pod.wait(40) == 0
    begun = next(turn for turn, (_, health, _) in enumerate(late) if health.status_code == 503)
    for request, health, metrics in late[begun + 1 :]:
        assert request.status_code == 503
        assert int(request.headers["Retry-After"]) > 0
        assert "stopping" in request.json()["error"]["message"]
        assert (health.status_code, health.json()["status"]) == (503, "stopping")
        assert "podloader_ready 0.0" in metrics.text
    engines = [m.text for _, _, m in late[begun + 1 :] if m.headers["Server"] != "podloader"]
    assert all("vllm:num_requests_running" in text for text in engines)
    assert late[-1][0].headers["Server"] == "podloader"  # which has the port back by then
    assert not [process for process in family if process.is_running()]
    endless.close()


def _asked_until_gone(pod: RunningPod) -> list[tuple[httpx.Response, ...]]:
    """Return the answers to a request, a probe and a scrape, each on a new connection, until the
    first that has none.
    """
    asked = {"model": "base", "prompt": "the quick", "max_tokens": 1}
    found: list[tuple[httpx.Response, ...]] = []
    with (
        contextlib.suppress(httpx.TransportError),
        httpx.Client(base_url=pod.url, headers={"Connection": "close"}, timeout=30) as client,
    ):
        while True:
            late = client.post("/v1/completions", json=asked)
            found.append((late, client.get("/health"), client.get("/metrics")))
            time.sleep(0.1)  # so as not to slow the end that it waits for
    return found


def test_an_engine_crash_is_the_pods_exit_code(
    origin: FaultyOrigin, tmp_path: Path, published: Path
) -> None:
    needs_namespaces()
    config = write_config(origin, tmp_path, "joba")
    pod = start_pod(config, environment={"VLLM_CPU_KVCACHE_SPACE": "1"})
    try:
        pod.wait_ready()
        family = [pod.pod, *pod.pod.children(recursive=True)]
        pod.stop_probing()
        pod.engine_core().send_signal(signal.SIGKILL)
        assert pod.wait(60) == 128 + signal.SIGKILL
        assert not [process for process in family if process.is_running()]
    finally:
        pod.close()


def test_a_python_error_in_the_engine_is_the_pods_exit_code(
    origin: FaultyOrigin, tmp_path: Path, published: Path
) -> None:
    """With a request under way: vLLM's server then ends by itself, and in order."""
    needs_namespaces()
    plugin = tmp_path / "plugin"
    named = plugin / "broken-1.dist-info"
    named.mkdir(parents=True)
    (named / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (named / "entry_points.txt").write_text("[vllm.general_plugins]\nbroken = broken:register\n")
    (plugin / "broken.py").write_text(_BROKEN_ENGINE)
    config = write_config(origin, tmp_path, "joba")
    broken = tmp_path / "now"
    environment = {"PYTHONPATH": str(plugin), "BROKEN": str(broken)}
    pod = start_pod(config, environment=environment | {"VLLM_CPU_KVCACHE_SPACE": "1"})
    try:
        pod.wait_ready()
        pod.stop_probing()
        broken.touch()
        asked = {"model": "base", "prompt": "the quick", "max_tokens": 9}
        assert httpx.post(f"{pod.url}/v1/completions", json=asked, timeout=60).status_code == 500
        assert pod.wait(60) == 6
    finally:
        pod.close()


_BROKEN_ENGINE = """
import os

def register():
    from vllm.v1.engine.core import EngineCoreProc
    step = EngineCoreProc._process_engine_step
    def broken(self):
        if os.path.exists(os.environ["BROKEN"]):
            raise RuntimeError("broken on purpose")
        return step(self)
    EngineCoreProc._process_engine_step = broken
"""


def test_an_adapter_that_changes_nothing_ends_the_pod(
    origin: FaultyOrigin, tmp_path: Path, published: Path
) -> None:
    """Its headers are right and no tensor is zero; only the engine's answers tell."""
    needs_namespaces()
    adapter = origin.folder(JOBS[0]) / "checkpoint-1"
    make_silent(adapter, origin.folder("silent") / "checkpoint-1")
    config = write_config(origin, tmp_path, "silent", adapter_policy="attach")
    pod = start_pod(config, environment={"VLLM_CPU_KVCACHE_SPACE": "1"})
    try:
        pod.wait_for(lambda body: "canary" in body.get("stage", ""), 300)
        assert pod.wait() == 5
        assert {status for _, status, _ in pod.answers} == {503}
        assert "adapters that change nothing in the engine" in pod.text()
        assert "- silent" in pod.text()
        assert "KeyboardInterrupt" not in pod.text()
    finally:
        pod.close()
