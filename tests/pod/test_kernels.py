"""Two pods and a bucket: what the first compiles, the second does not compile again."""

from __future__ import annotations

import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.models import tiny_llama
from tests.origin import FaultyOrigin, serving
from tests.pod.pods import RunningPod, start_pod, write_config
from tests.stores import moto

pytestmark = pytest.mark.engine

_ENGINE_ARGS = {"dtype": "float32", "max_model_len": 128}
_BUCKET = "kernels"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("published")
    made = FaultyOrigin(folder / "origin")
    tiny_llama(made.folder("base") / "base")
    made.server_close()
    with serving(folder / "origin") as found:
        yield found


def serve(origin: FaultyOrigin, disk: Path, s3_url: str) -> RunningPod:
    """Start a pod whose disk is *disk*, all of it."""
    config = write_config(
        origin,
        disk,
        "base",
        artifacts=[str(disk / "base.json")],
        base_model=None,
        engine_args=_ENGINE_ARGS,
        kernel_cache=f"s3://{_BUCKET}/llama",
        s3_endpoint_url=s3_url,
    )
    environment = {
        "AWS_ACCESS_KEY_ID": moto.ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": moto.SECRET_KEY,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(disk / "cache"),
        "XDG_CACHE_HOME": str(disk / "home"),
    }
    return start_pod(config, as_pid_1=False, environment=environment)


def answer(pod: RunningPod) -> str:
    body = {"model": "base", "prompt": "what is", "max_tokens": 8, "temperature": 0}
    found = httpx.post(f"{pod.url}/v1/completions", json=body, timeout=60)
    return str(found.json()["choices"][0]["text"])


def test_a_second_pod_on_an_empty_disk(origin: FaultyOrigin, tmp_path: Path, s3_url: str) -> None:
    s3 = moto.client(s3_url)
    s3.create_bucket(Bucket=_BUCKET)
    told, kept = [], []
    for _ in range(2):
        pod = serve(origin, tmp_path / "disk", s3_url)
        try:
            pod.wait_ready()
            told.append(answer(pod))
            limit = time.monotonic() + 60
            while not (told[1:] or "compiled kernels published" in pod.text()):
                assert time.monotonic() < limit, pod.text()
                time.sleep(0.2)
            kept.append(pod.text())
            pod.signal(signal.SIGTERM)
            assert pod.wait() == 0
        finally:
            pod.close()
        shutil.rmtree(tmp_path / "disk")
    assert told[0] == told[1]
    assert "compiled kernels published to s3://kernels/llama" in kept[0]
    assert "has no kernels compiled for this machine" in kept[0]
    assert re.search(r"compiled kernels of s3://kernels/llama: .* [kM]B", kept[1]), kept[1]
    assert "published" not in kept[1], kept[1]
    (only,) = s3.list_objects_v2(Bucket=_BUCKET)["Contents"]
    assert only["Key"].endswith(".kernels")
