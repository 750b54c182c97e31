"""Adapters for a server that runs: what is fetched for a name, and what is not."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from safetensors.torch import load_file, save_file

from loader.adapters.merge import WeightedAdapter, merge
from loader.config.settings import Settings
from loader.errors import (
    AdapterError,
    CheckpointError,
    DeniedError,
    DiskError,
    EngineError,
    FormatError,
    ListingError,
    LoaderError,
    RequestError,
    ResolveError,
    TransientError,
)
from loader.pod.live_adapters import LiveAdapters, fetch_adapter, fetch_named, live_environment
from loader.pod.plugin import register
from loader.serve.vllm.arguments import serve_arguments
from loader.serve.vllm.resolver import Adapters, AdapterSource, status_of
from loader.types import CONFIG_VARIABLE, ReadyModel, ServedAdapter
from tests import origin as faults
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import FaultyOrigin, serving, write_listing
from tests.other_models import draw_whisper_lora, tiny_whisper
from tests.serve.test_transformers import PROMPT, expected_text
from tests.test_boot import Job


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[FaultyOrigin]:
    """An empty one for each test, not the pods'."""
    with serving(tmp_path / "origin") as found:
        yield found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that podloader merged."""
    root = tmp_path_factory.mktemp("models")
    first = train_or_draw_lora(tiny_llama(root / "first"), root / "lora", spread=0.3)
    return merge(root / "first", [WeightedAdapter(first)], root / "base").path


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [train_or_draw_lora(base, root / f"a{i}", seed=i, spread=0.3) for i in (1, 2)]


def fill(job: Job, adapters: list[Path]) -> Job:
    job.put(adapters[0], "checkpoint-10")
    job.put(adapters[1], "run/checkpoint-20")
    job.put(adapters[0], "checkpoint-10", job="job2")
    return job


@pytest.fixture
def job(origin: FaultyOrigin, tmp_path: Path, adapters: list[Path]) -> Job:
    return fill(Job(origin, tmp_path), adapters)


def settings_of(job: Job) -> Settings:
    return job.settings("rank-0/", jobs=("job1", "job2"), adapter_jobs=["job1"])


def test_an_adapter_is_fetched_by_its_name(job: Job, base: Path) -> None:
    found = fetch_named(settings_of(job), base, "job1/checkpoint-10")
    assert found == ServedAdapter("job1/checkpoint-10", job.root / "job1/rank-0/checkpoint-10", 4)
    deep = fetch_named(settings_of(job), base, "job1/run/checkpoint-20")
    assert deep.path == job.root / "job1/rank-0/run/checkpoint-20"


@pytest.mark.parametrize(
    "name",
    [
        "job1",
        "job1/",
        "/checkpoint-10",
        "job2/checkpoint-10",  # there is a listing of it, but requests may not name it
        "job1/../job2/rank-0/checkpoint-10",
        "job1/run/../checkpoint-10",
        "job1//checkpoint-10",
        "job1/./checkpoint-10",
        "job1/*",
        "job1/checkpoint-?0",
        "job1/checkpoint-10/",
        "job1/checkpoint-10\0",
        "job1/checkpoint-10\n",
        "job1/" + "x" * 300,
        "../job1/checkpoint-10",
        "http://job1/checkpoint-10",
    ],
)
def test_names_that_are_refused_ask_the_origin_nothing(job: Job, base: Path, name: str) -> None:
    with pytest.raises(RequestError) as error:
        fetch_named(settings_of(job), base, name)
    assert error.value.status == 404
    assert job.origin.requests == []
    assert not job.root.exists()


def test_what_cannot_be_attached(job: Job, base: Path, tmp_path: Path) -> None:
    settings = settings_of(job)
    with pytest.raises(ResolveError):
        fetch_named(settings, base, "job1/checkpoint-11")
    with pytest.raises(CheckpointError, match="not one adapter") as many:
        fetch_adapter(settings, base, "job1", ["rank-0/"])
    assert len(many.value.problems) == 2
    job.put(train_or_draw_lora(base, tmp_path / "dora", use_dora=True), "dora")
    other = tiny_llama(tmp_path / "other", hidden_size=64, tokenizer=False)
    job.put(train_or_draw_lora(other, tmp_path / "misfit"), "misfit")
    settings = settings_of(job)  # its listing has the new ones
    with pytest.raises(AdapterError, match="cannot attach"):
        fetch_named(settings, base, "job1/dora")
    with pytest.raises(AdapterError, match="does not fit"):
        fetch_named(settings, base, "job1/misfit")


def test_over_a_model_of_another_task(job: Job, base: Path, tmp_path: Path) -> None:
    """vLLM would take it, prove nothing, and with Whisper die at the next transcription."""
    whisper = tiny_whisper(tmp_path / "whisper")
    job.put(draw_whisper_lora(whisper, tmp_path / "lora"), "heard")
    with pytest.raises(AdapterError, match="another task"):
        fetch_named(settings_of(job), whisper, "job1/heard")
    pooled = Path(shutil.copytree(base, tmp_path / "pooled"))
    (pooled / "modules.json").write_text('[{"type": "sentence_transformers.models.Pooling"}]')
    with pytest.raises(AdapterError, match="another task"):
        fetch_named(settings_of(job), pooled, "job1/checkpoint-10")


def test_nodes_with_other_adapters_under_one_name(
    job: Job, base: Path, adapters: list[Path]
) -> None:
    job.put(adapters[1], "checkpoint-10", rank=1)
    with pytest.raises(CheckpointError, match="under one name"):
        fetch_adapter(settings_of(job), base, "job1", ["rank-*/checkpoint-10/"])
    found = fetch_adapter(settings_of(job), base, "job1", ["rank-1/checkpoint-10/"])
    assert found.path == job.root / "job1/rank-1/checkpoint-10"


class Host:
    """Keeps what a running engine would serve."""

    def __init__(self) -> None:
        self.served: dict[str, ServedAdapter] = {}

    @property
    def adapters(self) -> tuple[ServedAdapter, ...]:
        return tuple(self.served.values())

    def add_adapter(self, adapter: ServedAdapter, *, replace: bool = False) -> None:
        assert replace or adapter.name not in self.served
        self.served[adapter.name] = adapter

    def remove_adapter(self, name: str) -> None:
        del self.served[name]


def test_live_adapters_come_in_the_background(job: Job, base: Path) -> None:
    """With the real engine: tests/serve/vllm/test_engine_adapters.py."""
    live = LiveAdapters(Host(), base, settings_of(job))
    first = live.add("job2", "rank-*/checkpoint-10/")  # the program may ask for any job
    second = live.add("job1", "rank-0/run/", name="green")
    assert first.result().name == "job2/checkpoint-10"
    assert second.result().path == job.root / "job1/rank-0/run/checkpoint-20"
    assert live.replace("green", "job1", "rank-0/checkpoint-10/").result().name == "green"
    assert [a.name for a in live.list()] == ["job2/checkpoint-10", "green"]
    assert live.list()[1].path == job.root / "job1/rank-0/checkpoint-10"
    live.remove("green")
    assert len(live.list()) == 1
    with pytest.raises(ResolveError):
        live.add("job1", "rank-0/none/").result()
    live.close()


def source(root: Path, fetch: Any) -> AdapterSource:
    return AdapterSource(
        {"job1", "job2"}, root, fetch, lambda _, p, name: ServedAdapter(name, p, 4)
    )


@pytest.mark.parametrize(
    ("problem", "pause_s"), [(ResolveError("nothing matches"), 30), (TransientError("down"), 5)]
)
async def test_what_was_refused_is_asked_for_again_after_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: LoaderError, pause_s: float
) -> None:
    asked: list[str] = []

    def fetch(base: str, name: str) -> ServedAdapter:
        asked.append(name)
        raise problem

    adapters = Adapters(source(tmp_path, fetch))
    now = time.monotonic()
    for after_s in (0, pause_s - 1, pause_s + 1):
        monkeypatch.setattr(time, "monotonic", lambda after_s=after_s: now + after_s)
        with pytest.raises(type(problem)), adapters.asked("job1/x"):
            await adapters.find("base", "job1/x")
    assert asked == ["job1/x"] * 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("no such name", status=404), 404),
        (ResolveError("nothing matches"), 404),
        (AdapterError("does not fit"), 400),
        (FormatError("broken"), 400),
        (TransientError("the origin is down"), 503),
        (DiskError("full"), 503),
        (ListingError("none"), 503),
        (DeniedError("403"), 502),
        (EngineError("dead"), 500),
    ],
)
def test_the_status_of_a_refusal(error: LoaderError, status: int) -> None:
    assert status_of(error) == status


async def test_no_job_keeps_another_waiting(tmp_path: Path) -> None:
    over = threading.Event()

    def fetch(base: str, name: str) -> ServedAdapter:
        if name.startswith("job1/"):
            over.wait()
        return ServedAdapter(name, tmp_path, 4)

    adapters = Adapters(source(tmp_path, fetch))
    stalled = [asyncio.create_task(adapters.find("base", f"job1/{i}")) for i in range(200)]
    await asyncio.sleep(0)
    assert (await adapters.find("base", "job2/x")).name == "job2/x"
    busy = [thread for thread in threading.enumerate() if thread.name == "adapter"]
    assert 17 <= len(busy) <= 40
    over.set()
    assert len(await asyncio.gather(*stalled)) == 200


async def test_first_uses_on_a_stalling_origin_keep_no_healthy_one_waiting(
    job: Job, base: Path, adapters: list[Path]
) -> None:
    for number in range(16):
        job.put(adapters[0], f"slow-{number}")
        name = f"rank-0/slow-{number}/adapter_model.safetensors"
        job.origin.fail(name, *[faults.stall(30)] * 20)
    settings = replace(settings_of(job), retries=1, stall_timeout_s=4)
    served = AdapterSource(
        settings.adapter_jobs,
        job.root,
        lambda base, name: fetch_named(settings, Path(base), name),
        lambda *_: pytest.fail("nobody asks for a folder"),
    )
    asked = Adapters(served)
    slow = [asyncio.create_task(asked.find(str(base), f"job1/slow-{i}")) for i in range(16)]
    await asyncio.sleep(1)
    async with asyncio.timeout(10):
        assert (await asked.find(str(base), "job1/checkpoint-10")).rank == 4
    assert not any(task.done() for task in slow)
    for task in slow:
        task.cancel()
    job.origin.faults.clear()


async def test_paths_stay_below_the_download_folder(tmp_path: Path) -> None:
    def fetch(base: str, name: str) -> ServedAdapter:
        return ServedAdapter(name, tmp_path / "fetched", 4)

    root = tmp_path / "down"
    (root / "job1").mkdir(parents=True)
    (root / "way-out").symlink_to(tmp_path)
    adapters = Adapters(source(root, fetch))
    assert (await adapters.locate("base", str(root / "job1"), "x")).path == root / "job1"
    fetched = await adapters.locate("base", "job1/checkpoint-10", "x")
    assert fetched.path == tmp_path / "fetched"
    for path in ("/etc", str(root / "../x"), str(root / "way-out"), "./x", "~", f"{root}-b"):
        with pytest.raises(AdapterError, match="leads out"):
            await adapters.locate("base", path, "x")


def test_the_servers_process_gets_the_same_settings(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job.folder / "config.yaml"
    own = {"artifacts": ["/none.json"], "adapter_jobs": ["job1"], "range_size": "1MiB"}
    references = [{"training_job_id": "job1", "paths": ["rank-0/"]}]
    config.write_text(
        yaml.safe_dump(
            {
                "training_checkpoints": {"artifact_references": references},
                "model_metadata": {"podloader": own},
            }
        )
    )
    over = {"artifacts": ("a.json", "b c.json"), "engine_args": {"max_loras": 5}, "canary": "no"}
    settings = Settings.load(config, overrides=over)
    assert live_environment(job.settings("rank-0/"), config) == {}
    for name, value in live_environment(settings, config).items():
        monkeypatch.setenv(name, value)
    assert os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    again = Settings.load(os.environ[CONFIG_VARIABLE])
    assert again == settings
    assert again.artifacts == ("a.json", "b c.json")


def test_the_plugin_stays_out_of_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    register()
    code = "import sys, loader.pod.plugin as p; p.register(); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert not {"pydantic", "torch", "vllm"} & set(found.stdout.split())


def weights_of(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


_VLLM_SERVER = "vllm.entrypoints.launchers.api_server.entry"


@dataclass(frozen=True, eq=False)
class Server:
    """vLLM's own server, and the origin that it fetches from."""

    url: str
    origin: FaultyOrigin
    base: Path
    adapters: list[Path]
    log: Path
    listing: Path

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{path}", json=body, timeout=60)

    def complete(self, name: str, prompt: str = PROMPT) -> httpx.Response:
        return self.post("completions", model=name, prompt=prompt, temperature=0, max_tokens=12)

    def text(self, name: str, prompt: str = PROMPT) -> str:
        answer = self.complete(name, prompt)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
        return str(answer.json()["choices"][0]["text"])

    @functools.cache  # noqa: B019 - one server
    def expected(self, adapter: Path | None) -> str:
        one = (ServedAdapter("a", adapter, 4),) if adapter else ()
        ready = ReadyModel(self.base, one, 8, self.base, {})
        return expected_text(ready, "a" if adapter else None)

    def check(self, name: str, adapter: Path) -> None:
        """Greedy text is PEFT's; a character that is cut at the end may be left out."""
        text = self.text(name).rstrip("\N{REPLACEMENT CHARACTER}")
        assert self.expected(adapter).startswith(text)
        others = [other for other in self.adapters if other != adapter]
        assert text
        assert not any(self.expected(other).startswith(text) for other in others)

    def names(self) -> set[str]:
        return {m["id"] for m in httpx.get(f"{self.url}/v1/models").json()["data"]}


@pytest.fixture(scope="module")
def server(
    base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """``vllm serve`` as the entrypoint starts it, with adapters of job1 allowed."""
    root = tmp_path_factory.mktemp("server")
    with serving(root / "origin") as origin:
        job = fill(Job(origin, root), adapters)
        settings = settings_of(job)
        config = root / "config.yaml"
        own = {"artifacts": list(settings.artifacts), "adapter_jobs": ["job1"]}
        config.write_text(
            yaml.safe_dump(
                {
                    "training_checkpoints": {
                        "download_folder": str(job.root),
                        "artifact_references": [{"training_job_id": "job1", "paths": ["rank-0/"]}],
                    },
                    "model_metadata": {"podloader": own},
                }
            )
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        engine_args = {
            "dtype": "float32", "max_model_len": 256, "enforce_eager": True, "max_loras": 4,
            "host": "127.0.0.1", "port": port,
        }  # fmt: skip
        names = zip(("red", "blue"), adapters, strict=True)
        ready = ReadyModel(base, tuple(ServedAdapter(n, a, 4) for n, a in names), 8, base, {})
        model, *arguments = serve_arguments(ready, engine_args, served_model_name="base")
        environment = {
            **os.environ,
            **live_environment(settings, config),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
        with (root / "log").open("wb") as log:
            process = subprocess.Popen(
                # What `vllm serve` runs; the CPU build's own command looks for another package.
                [sys.executable, "-m", _VLLM_SERVER, "--model", model, *arguments],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait(process, port, root / "log")
            url, listing = f"http://127.0.0.1:{port}", Path(settings.artifacts[0])
            yield Server(url, origin, base, adapters, root / "log", listing)
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-5000:]
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-5000:])


@pytest.mark.engine
class TestServer:
    def test_a_merged_base_says_what_transformers_says(self, server: Server) -> None:
        text = server.text("base").rstrip("\N{REPLACEMENT CHARACTER}")
        assert text
        assert expected_text(ReadyModel(server.base, (), None, server.base, {}), None).startswith(
            text
        )

    def test_fetched_on_first_use(self, server: Server) -> None:
        assert "job1/checkpoint-10" not in server.names()
        server.check("job1/checkpoint-10", server.adapters[0])
        asked = len(server.origin.requests)
        server.check("job1/checkpoint-10", server.adapters[0])
        assert len(server.origin.requests) == asked
        assert "job1/checkpoint-10" in server.names()

    def test_names_that_are_refused(self, server: Server) -> None:
        before = len(server.origin.requests)
        for name in ("job2/checkpoint-10", "job1/absent", "job1/*", "job1/../x", "/etc", "x@2"):
            assert server.complete(name).status_code == 404, name
        assert len(server.origin.requests) == before
        assert server.text("base")

    def test_loaded_replaced_unloaded(self, server: Server) -> None:
        first = {"lora_name": "green", "lora_path": "job1/checkpoint-10"}
        second = {"lora_name": "green", "lora_path": "job1/run/checkpoint-20"}
        answer = server.post("load_lora_adapter", **first)
        assert answer.status_code == 200, answer.text
        server.check("green", server.adapters[0])
        assert server.post("load_lora_adapter", **second).status_code == 400
        answer = server.post("load_lora_adapter", **second, load_inplace=True)
        assert answer.status_code == 200, answer.text
        server.check("green", server.adapters[1])
        assert "green" in server.names()
        assert not any("@" in name for name in server.names())
        assert server.post("unload_lora_adapter", lora_name="green").status_code == 200
        assert server.complete("green").status_code == 404

    def test_mixed_batches_are_answered_by_what_they_ask_for(self, server: Server) -> None:
        """With as many adapters as there are slots, and then more."""
        named = {"red": 0, "blue": 1, "job1/checkpoint-10": 0, "job1/run/checkpoint-20": 1}
        for number in range(3):
            asked = ["base", *named] * 4
            with ThreadPoolExecutor(len(asked)) as pool:
                texts = list(pool.map(server.text, asked))
            for name, text in zip(asked, texts, strict=True):
                adapter = server.adapters[named[name]] if name in named else None
                assert server.expected(adapter).startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))
            more = {"lora_name": f"more-{number}", "lora_path": "job1/checkpoint-10"}
            assert server.post("load_lora_adapter", **more).status_code == 200
            named[f"more-{number}"] = 0

    def test_what_changed_at_the_origin_is_served_after_an_unload(self, server: Server) -> None:
        """Long prompts: their blocks are in the cache."""
        name, long = "job1/changing", PROMPT * 30
        published = server.origin.folder("job1") / "changing"
        answers = []
        for adapter in (*server.adapters, server.adapters[0]):
            shutil.copytree(adapter, published, dirs_exist_ok=True)
            write_listing(server.origin, server.listing, "job1")
            server.check(name, adapter)
            answers.append([server.text(name, long) for _ in range(2)])
            assert server.post("unload_lora_adapter", lora_name=name).status_code == 200
        assert answers[0] == answers[2] != answers[1]

    def test_what_is_refused_has_one_reason_both_ways(self, server: Server) -> None:
        """By name, by lora_path, in the log."""
        tensors = {n: t * math.nan for n, t in load_file(weights_of(server.adapters[0])).items()}
        for name in ("spoiled", "broken", "dora"):
            shutil.copytree(server.adapters[0], server.origin.folder("job1") / name)
        save_file(tensors, weights_of(server.origin.folder("job1") / "spoiled"))
        weights_of(server.origin.folder("job1") / "broken").write_bytes(b"no weights")
        config = server.origin.folder("job1") / "dora/adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
        write_listing(server.origin, server.listing, "job1")
        for name, status, reason in (
            ("job1/spoiled", 400, "NaN or infinite values in an adapter"),
            ("job1/broken", 400, "file is broken"),
            ("job1/dora", 400, "adapters that vLLM cannot attach"),
            ("job1/absent", 404, "absent"),
        ):
            by_name = server.complete(name)
            by_path = server.post("load_lora_adapter", lora_name="x", lora_path=name)
            assert by_name.status_code == by_path.status_code == status, by_name.text
            assert by_name.json()["error"]["message"] == by_path.json()["error"]["message"]
            assert reason in by_name.json()["error"]["message"]
            assert reason in server.log.read_text()
            assert name not in server.names()

    def test_paths_and_names_that_lead_out(self, server: Server) -> None:
        outside = str(server.adapters[0])
        for name, path in (
            ("x", outside),
            ("x", "/etc"),
            ("x", "job2/checkpoint-10"),
            ("x", "job1/../../x"),
            ("x", "org/some-model"),
            ("../x", "job1/checkpoint-10"),
            ("a@2", "job1/checkpoint-10"),
        ):
            answer = server.post("load_lora_adapter", lora_name=name, lora_path=path)
            assert 400 <= answer.status_code < 500, (name, path, answer.text)
        assert "x" not in server.names()
