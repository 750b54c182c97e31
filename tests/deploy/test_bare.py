"""Containers that lack what most have: a home, a name, a root or /tmp to write to."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.deploy.image import Image, run
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import serving, write_listing
from tests.pod.pods import ENGINE_ARGS, RunningPod, free_port

NOBODY = "12345:12345"


@pytest.fixture(scope="module")
def bare(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The image with a base and an adapter to fetch, and no variable but PATH."""
    folder = tmp_path_factory.mktemp("published")
    base = tiny_llama(folder / "base")
    with serving(folder / "origin") as origin:
        base.rename(origin.folder("job1") / "base")
        train_or_draw_lora(origin.folder("job1") / "base", origin.folder("job1") / "lora")
        write_listing(origin, Path(f"{image.root}/app/published.json"), "job1")
        yield replace(image, variables={"PATH": image.variables["PATH"]})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["env"],
        ["plan", "published.json", "rank-0/base/"],
        ["inspect", "published.json"],
        ["fetch", "published.json", "--output", "/cache/down", "rank-0/lora/"],
        ["prepare", "published.json", "--download-folder", "/cache/down", "rank-0/base/"],
    ],
    ids=lambda words: words[0],
)
def test_no_home_no_name_no_root_to_write_to(bare: Image, cache: Path, words: list[str]) -> None:
    done = run(bare, cache, "podloader", *words, user=NOBODY)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_merge_without_all_of_that(bare: Image, cache: Path) -> None:
    words = ["--download-folder", "/cache/down", "rank-0/lora/", "--set", "adapter_policy=merge"]
    words += ["--set", "base_model=checkpoint:job1/rank-0/base/"]
    done = run(bare, cache, "podloader", "prepare", "published.json", *words, user=NOBODY)
    assert done.returncode == 0, done.stderr
    assert list(cache.glob("down/.podloader/**/*.safetensors"))


def test_a_download_folder_that_cannot_be_written(bare: Image, cache: Path) -> None:
    done = run(bare, cache, "podloader", "fetch", "published.json", "--output", "/x", user=NOBODY)
    assert done.returncode == 4, done.stderr
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr


FULL = "4k"


def test_a_full_tmp_to_fetch_into(bare: Image, cache: Path) -> None:
    done = run(
        bare, cache, "podloader", "fetch", "published.json", "--output", "/tmp/down", tmp=FULL
    )
    assert done.returncode == 4, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_tmp_to_inspect_in(bare: Image, cache: Path) -> None:
    words = ["sh", "-c", "head -c 1M /dev/zero >/tmp/x; podloader inspect published.json"]
    done = run(bare, cache, *words, tmp=FULL)
    assert done.returncode == 4, done.stderr
    assert "TMPDIR" in done.stderr
    assert "Traceback" not in done.stderr
    done = run(bare, cache, *words, tmp=FULL, user=NOBODY, TMPDIR="/cache")
    assert done.returncode == 0, done.stderr


@pytest.mark.engine
def test_an_engine_without_all_of_that(bare: Image, cache: Path, tmp_path: Path) -> None:
    """Nothing can be kept of what vLLM compiles, and the log says so; it answers all the same."""
    document = {
        "training_checkpoints": {
            "download_folder": "/cache/down",
            "artifact_references": [{"training_job_id": "job1", "paths": ["rank-0/base/"]}],
        },
        "model_metadata": {
            "podloader": {"artifacts": ["published.json"], "engine_args": ENGINE_ARGS}
        },
    }
    Path(f"{bare.root}/app/bare.yaml").write_text(yaml.safe_dump(document))
    port = free_port()
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CACHE_ROOT": "/var/empty"}
    arguments = ["/app/bare.yaml", "--", "--port", str(port)]
    command = bare.command(*arguments, cache=cache, variables=variables, user=NOBODY)
    pod = RunningPod(command, tmp_path, port)
    try:
        pod.wait_ready()
        assert "vLLM's cache, /var/empty, is empty and user 12345 cannot write it" in pod.text()
        told = pod.get("/status.json").json()["facts"]
        assert told["checkpoints"] == ["job1/rank-0/base/"]
        assert told["model"] == "/cache/down/job1/rank-0/base"
        assert set(told["versions"]) == {"podloader", "vllm", "torch"}
        pod.signal(signal.SIGTERM)
        assert pod.wait(60) == 0
    finally:
        pod.close()
