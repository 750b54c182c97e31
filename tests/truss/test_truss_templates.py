"""The Truss templates: read by Truss's own config, run by Truss's own server."""

from __future__ import annotations

import ctypes
import json
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import APIStatusError, OpenAI
from safetensors.torch import save_file
from truss.base.truss_config import TrussConfig

from loader.config.settings import Settings
from loader.serve.vllm.arguments import parse_arguments, serve_arguments
from loader.types import ReadyModel, ServedAdapter
from tests.images import TEMPLATES
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import FaultyOrigin, serving, write_listing
from tests.serve.truss_server import TrussServer, running_template
from tests.stores import moto
from tests.stores.api import KEY, Api
from tests.stores.hub import Hub

NAMES = sorted(path.parent.name for path in TEMPLATES.glob("*/config.yaml"))
ENGINE_ARGS = {"enforce_eager": True, "dtype": "float32", "max_model_len": 256}
_CLONE_NEWNET = 0x40000000  # linux/sched.h
PROMPT = {"prompt": "the capital of france", "temperature": 0, "max_tokens": 8}


@pytest.mark.parametrize("name", NAMES)
def test_truss_and_podloader_read_the_config(name: str, tmp_path: Path) -> None:
    config = TrussConfig.from_yaml(TEMPLATES / name / "config.yaml")
    config.write_to_yaml_file(tmp_path / "config.yaml", verbose=True)
    settings = Settings.load(tmp_path / "config.yaml")
    assert settings.artifacts
    assert settings.training.artifact_references
    assert "baseten_api_key" in config.secrets
    assert set(config.secrets.values()) == {None}
    assert ("hf_access_token" in config.secrets) == (name != "custom-architecture")


@pytest.mark.parametrize(
    ("name", "endpoint"),
    [("vllm-server", "/v1/chat/completions"), ("whisper", "/v1/audio/transcriptions")],
)
def test_the_containers_that_podloader_starts(name: str, endpoint: str) -> None:
    config = TrussConfig.from_yaml(TEMPLATES / name / "config.yaml")
    server = config.docker_server
    assert server is not None
    assert server.predict_endpoint == endpoint
    assert (server.readiness_endpoint, server.liveness_endpoint) == ("/health", "/health")
    # As Truss's supervisor splits it; exec, so that the signals reach podloader.
    shell, option, script = shlex.split(str(server.start_command))
    assert (shell, option) == ("sh", "-c")
    assert script == f"cd /app && exec podloader serve config.yaml -- --port {server.server_port}"
    assert config.runtime.health_checks.startup_threshold_seconds


@pytest.mark.engine
@pytest.mark.parametrize("name", [n for n in NAMES if n != "custom-architecture"])
def test_vllms_own_parser_reads_the_arguments(name: str) -> None:
    settings = Settings.load(TEMPLATES / name / "config.yaml")
    base = Path("/models/base")
    adapters = (ServedAdapter("a", Path("/a"), 8),) if name == "lora-multi" else ()
    arguments = serve_arguments(
        ReadyModel(base, adapters, 8 if adapters else None, base, {}),
        settings.engine_args,
        served_model_name=settings.served_model_name,
        extra=("--port", "8000"),
    )
    args = parse_arguments(arguments)
    assert args.served_model_name == [settings.served_model_name]
    assert args.port == 8000


class Job:
    """A base model, two adapters of one job, and their listing behind signed URLs."""

    def __init__(self, folder: Path, origin: Any) -> None:
        self.folder = folder
        self.base = tiny_llama(folder / "base")
        for seed, name in enumerate(("checkpoint-1", "checkpoint-2"), start=1):
            lora = train_or_draw_lora(self.base, folder / name, seed=seed, spread=0.3)
            shutil.copytree(lora, origin.folder("job1") / name)
        self.listing = write_listing(origin, folder / "checkpoints.json", "job1")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    folder = tmp_path_factory.mktemp("job")
    with serving(folder / "origin") as origin:
        yield Job(folder, origin)


def start(job: Job, template: str, folder: Path, **settings: str) -> Any:
    """Run *template* on *job*'s checkpoints."""
    own = {"PODLOADER_BASE_MODEL": str(job.base), "PODLOADER_SERVED_MODEL_NAME": "base"}
    return running_template(template, folder, job.listing, own | settings)


def text_of(server: TrussServer, body: dict[str, Any]) -> str:
    response = server.predict(body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["model"] == body["model"]
    return str(answer["choices"][0]["text"])


@pytest.fixture(scope="module")
def vllm_server(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrussServer]:
    with start(
        job,
        "vllm-model",
        tmp_path_factory.mktemp("pod"),
        PODLOADER_ENGINE_ARGS=json.dumps(ENGINE_ARGS),
    ) as server:
        yield server


@pytest.mark.engine
class TestVLLMModel:
    """The template ``vllm-model`` on vLLM."""

    def test_completions_of_base_and_adapters(self, vllm_server: TrussServer) -> None:
        names = ("base", "job1-checkpoint-1", "job1-checkpoint-2")
        texts = {text_of(vllm_server, PROMPT | {"model": name}) for name in names}
        assert len(texts) == 3

    def test_a_streamed_completion(self, vllm_server: TrussServer) -> None:
        body = PROMPT | {"model": "job1-checkpoint-1"}
        url = f"{vllm_server.url}/v1/models/model:predict"
        with httpx.stream("POST", url, json=body | {"stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert lines.pop() == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert "".join(e["choices"][0]["text"] for e in events) == text_of(vllm_server, body)

    def test_the_openai_client(self, vllm_server: TrussServer) -> None:
        client = OpenAI(base_url=f"{vllm_server.url}/v1", api_key="none", max_retries=0)
        messages: Any = [{"role": "user", "content": "hi"}]
        chat = client.chat.completions.create(
            model="job1-checkpoint-2", messages=messages, max_tokens=3
        )
        assert chat.choices[0].message.role == "assistant"
        stream = client.chat.completions.create(
            model="base", messages=messages, max_tokens=3, stream=True
        )
        assert sum(1 for _ in stream) > 1
        assert client.completions.create(model="base", prompt="x", max_tokens=2).choices
        with pytest.raises(APIStatusError) as error:
            client.chat.completions.create(model="absent", messages=messages)
        assert error.value.status_code == 404
        assert "job1-checkpoint-1" in error.value.message

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            ({}, 400),
            ([], 400),
            (PROMPT, 400),  # no model among several
            (PROMPT | {"model": "absent"}, 404),
            (PROMPT | {"model": "base", "max_tokens": -1}, 400),
            (PROMPT | {"model": "base", "max_tokens": -1, "stream": True}, 400),
        ],
    )
    def test_bad_requests(self, vllm_server: TrussServer, body: Any, status: int) -> None:
        response = vllm_server.predict(body)
        assert response.status_code == status
        error = response.json()["error"]
        assert error["message"]
        assert error["code"] == status
        assert httpx.get(f"{vllm_server.url}/v1/models/model").status_code == 200

    def test_each_path_takes_its_own_bodies(self, vllm_server: TrussServer) -> None:
        body = PROMPT | {"model": "base"}
        assert httpx.post(f"{vllm_server.url}/v1/completions", json=body).status_code == 200
        assert httpx.post(f"{vllm_server.url}/v1/chat/completions", json=body).status_code == 400

    def test_clients_that_go_away_stop_their_requests(self, vllm_server: TrussServer) -> None:
        before = _generated_tokens(vllm_server)
        long = PROMPT | {"model": "base", "max_tokens": 240, "ignore_eos": True}
        url = f"{vllm_server.url}/v1/models/model:predict"
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=long, timeout=httpx.Timeout(5, read=0.1))
        with httpx.stream("POST", url, json=long | {"stream": True}) as response:
            next(response.iter_lines())
        assert 0 < _generated_tokens(vllm_server) - before < 240

    def test_the_log_tells_of_the_boot(self, vllm_server: TrussServer) -> None:
        log = vllm_server.log.read_text()
        assert "adapters: attach" in log
        assert "fetching" in log

    def test_the_engine_is_imported_beside_the_download(self, vllm_server: TrussServer) -> None:
        imports, download, start = (
            stage_of(vllm_server.log, name)
            for name in ("engine import", "download", "engine start")
        )
        look = stage_of(vllm_server.log, "model class")
        rounded_s = 0.02  # what an end may be off by, whose start and seconds the table rounds
        assert download[0] <= imports[0] <= download[1] + rounded_s
        assert imports[1] <= start[0] + rounded_s
        # Of the base's config.json: HOME is new here, and vLLM keeps what it finds out below it.
        assert imports[1] <= look[1] + rounded_s
        assert look[1] <= start[0] + rounded_s


def stage_of(log: Path, name: str) -> tuple[float, float]:
    """Return when a stage began and ended, by the table at the end of the start."""
    found = re.search(rf"^.*? ([\d.]+) +([\d.]+)  {name} ", log.read_text(), re.MULTILINE)
    assert found, log.read_text()
    start, seconds = map(float, found.groups())
    return start, start + seconds


def _generated_tokens(server: TrussServer) -> float:
    """Return the count of vLLM's own metrics once it no longer grows."""
    counts = [-1.0, -2.0]
    while counts[-1] != counts[-2]:
        time.sleep(0.5)
        lines = httpx.get(f"{server.url}/metrics/").text.splitlines()
        found = [line for line in lines if line.startswith("vllm:generation_tokens_total{")]
        counts.append(sum(float(line.rpartition(" ")[2]) for line in found))
    return counts[-1]


@pytest.fixture
def hub(job: Job) -> Iterator[Hub]:
    """A Hub with the base as ``org/base``."""
    found = Hub(job.base)
    yield found
    found.shutdown()
    found.server_close()


@pytest.mark.engine
def test_lora_multi_with_secrets_for_s3_and_the_hub_and_spans(
    job: Job, hub: Hub, tmp_path: Path
) -> None:
    token = "hf_hush"
    with moto.serving(tmp_path) as s3_url:
        moto.client(s3_url).create_bucket(Bucket="runs")
        for path in (job.folder / "origin").rglob("*"):
            if path.is_file():
                key = path.relative_to(job.folder / "origin").as_posix()
                moto.client(s3_url).upload_file(str(path), "runs", key)
        settings = {
            "PODLOADER_ENGINE": "transformers",
            "PODLOADER_ARTIFACTS": "s3://runs/",
            "PODLOADER_S3_ENDPOINT_URL": s3_url,
            "PODLOADER_BASE_MODEL": "org/base",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "OTEL_TRACES_EXPORTER": "console",
        }
        secrets = {
            "aws_access_key_id": moto.ACCESS_KEY,
            "aws_secret_access_key": moto.SECRET_KEY,
            "hf_access_token": token,
        }
        with running_template(
            "lora-multi", tmp_path / "pod", job.listing, settings, secrets
        ) as server:
            names = ("base", "job1-checkpoint-1", "job1-checkpoint-2")
            texts = {text_of(server, PROMPT | {"model": name}) for name in names}
            assert len(texts) == 3
            assert server.predict(PROMPT | {"model": "absent"}).status_code == 404
            log = server.log.read_text()
    asked = {authorization for path, authorization in hub.requests if path.startswith("/org/base")}
    assert asked == {f"Bearer {token}"}
    spans = set(re.findall(r'"name": "([^"]+)"', log))
    assert {"podloader", "listing", "download", "engine import", "engine start"} <= spans
    assert "job1/rank-0/checkpoint-1/adapter_model.safetensors" in spans
    assert not [hidden for hidden in (token, moto.SECRET_KEY) if hidden in log]


@pytest.mark.engine
def test_files_that_another_tool_laid_there_no_artifacts_and_no_network(tmp_path: Path) -> None:
    with serving(tmp_path / "origin") as origin:
        job = Job(tmp_path, origin)
    job.listing.write_text("")  # nothing to read there
    for name in ("checkpoint-1", "checkpoint-2"):
        laid = tmp_path / "down/rank-0" / name
        laid.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", str(job.folder / name), str(laid)], check=True)
    settings = {
        "PODLOADER_ARTIFACTS": "[]",
        "PODLOADER_BASE_MODEL": str(job.base),
        "PODLOADER_SERVED_MODEL_NAME": "base",
        "PODLOADER_ENGINE_ARGS": json.dumps(ENGINE_ARGS),
    }

    def serve() -> str:
        with running_template("lora-multi", tmp_path, job.listing, settings) as server:
            names = ("base", "job1-checkpoint-1", "job1-checkpoint-2")
            assert len({text_of(server, PROMPT | {"model": name}) for name in names}) == 3
            return server.log.read_text()

    log = run_without_network(serve)
    assert "adoption" in log
    assert "listing" in log


def run_without_network(work: Callable[[], str]) -> str:
    """Return what *work* does, it and its processes, where there is but a loopback of its own."""

    def alone() -> str:
        # SAFETY: of this thread alone, which ends with *work*; it takes numbers, and follows none.
        if ctypes.CDLL(None).unshare(_CLONE_NEWNET):
            pytest.skip("making a network namespace is not permitted here")
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        with pytest.raises(OSError):
            socket.create_connection(("192.0.2.1", 80), timeout=1)
        return work()

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(alone).result()


def classifier(folder: Path) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    """Save a network that no engine knows; return its layers."""
    torch.manual_seed(0)
    hidden, out = torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)
    folder.mkdir()
    (folder / "config.json").write_text('{"inputs": 3, "hidden": 8, "labels": ["cat", "dog"]}')
    layers = (("hidden", hidden), ("out", out))
    save_file(
        {f"{name}.{k}": v for name, layer in layers for k, v in layer.state_dict().items()},
        folder / "model.safetensors",
    )
    return hidden, out


@contextmanager
def served_api(origin: FaultyOrigin) -> Iterator[Api]:
    api = Api(origin)
    try:
        yield api
    finally:
        api.stop()


@pytest.mark.engine
def test_custom_architecture_with_a_secret_for_the_api(tmp_path: Path) -> None:
    with serving(tmp_path / "origin") as origin, served_api(origin) as api:
        hidden, out = classifier(origin.folder("job1") / "checkpoint-1")
        listing = write_listing(origin, tmp_path / "listing.json", "job1")
        rows = torch.randn(4, 3)
        settings = {"PODLOADER_ARTIFACTS": "baseten", "PODLOADER_API_URL": api.url}
        secrets = {"baseten_api_key": KEY}
        with running_template(
            "custom-architecture", tmp_path, listing, settings, secrets
        ) as server:
            answer = server.predict({"inputs": rows.tolist()})
            assert answer.status_code == 200, answer.text
            log = server.log.read_text()
    assert api.requests
    expected = torch.softmax(out(torch.relu(hidden(rows))), dim=-1).max(dim=-1)
    assert answer.json()["labels"] == [("cat", "dog")[i] for i in expected.indices.tolist()]
    found = torch.tensor(answer.json()["probabilities"])
    torch.testing.assert_close(found, expected.values.detach())
    assert "fetching" in log
    assert KEY not in log
