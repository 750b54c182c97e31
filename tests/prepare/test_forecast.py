"""What a start would do and take, before it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from loader import boot
from loader.errors import EngineError, LoaderError
from loader.prepare import forecast as forecasts
from loader.serve import room
from loader.serve.machine import Gpu, Machine, Node
from loader.serve.vllm import failures
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import FaultyOrigin, write_listing
from tests.stores.hub import Hub
from tests.test_boot import Job

GB = 10**9


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_or_draw_lora(base, tmp_path_factory.mktemp("models") / "adapter")


@pytest.fixture
def job(origin: FaultyOrigin, tmp_path: Path) -> Job:
    return Job(origin, tmp_path)


@pytest.fixture
def hub(base: Path) -> Iterator[Hub]:
    found = Hub(base)
    yield found
    found.shutdown()
    found.server_close()


def plan_over(hub: str, job: Job, *words: str) -> tuple[dict[str, Any], str]:
    """Return the document of a plan whose base is the Hub's, and what it shows people."""
    listing = write_listing(job.origin, job.folder / "listing.json")
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(job.folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "loader", "plan", str(listing), "--json", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document, done.stderr


def test_a_base_on_the_hub_is_in_the_plan(hub: Hub, job: Job, adapter: Path) -> None:
    job.put(adapter, "checkpoint-1")
    words = ("--set", "base_model=org/base", "--output", str(job.root))
    document, shown = plan_over(hub.url, job, *words)
    sizes = {f"org/base/{p.name}": p.stat().st_size for p in hub.folder.iterdir()}
    of_base = {f["path"]: f["size_bytes"] for f in document["files"] if f["job"] is None}
    assert of_base == sizes
    own = sum(p.stat().st_size for p in adapter.iterdir())
    assert document["total_bytes"] == own + sum(sizes.values())
    assert document["start"] == {
        "engine": "vllm",
        "mode": "attach",
        "consolidates": False,
        "why": "vLLM serves plain LoRA as it is, nothing to write first",
        "weights": document["start"]["weights"],
        "share": None,
    }
    assert document["base"]["origin"] == "the Hub"
    assert (
        sum(r["needed_bytes"] for r in document["room"] if r["what"] == "disk")
        == (document["total_bytes"])
    )
    assert "of the base, from the Hub" in shown
    assert not list((job.folder / "home").rglob("*.safetensors"))
    assert not [path for path, _ in hub.requests if path.endswith(".safetensors")]
    assert not job.root.exists()


def test_a_hub_that_cannot_be_asked_is_told(job: Job, adapter: Path) -> None:
    job.put(adapter, "checkpoint-1")
    words = ("--set", "base_model=org/base", "--output", str(job.root))
    document, shown = plan_over("http://127.0.0.1:1", job, *words)
    (warning,) = document["warnings"]
    assert warning.startswith("the base org/base is not in this plan: ")
    assert f"warning: {warning}" in shown
    assert len(document["files"]) == len(list(adapter.iterdir()))


def test_a_base_behind_a_url_is_in_the_plan_and_merged(job: Job, adapter: Path, base: Path) -> None:
    job.put(adapter, "checkpoint-1")
    found = boot.look_ahead(job.settings("rank-0/", base_model=f"file://{base}"))
    assert found.mode == "merge"
    assert found.base is not None
    assert found.base.weight_bytes == (base / "model.safetensors").stat().st_size
    assert {file.presence for file in found.base_files} == {"missing"}
    for start, told in (("auto", "while they arrive"), ("files", "files: as engine_start says")):
        settings = job.settings("rank-0/", base_model=f"file://{base}", engine_start=start)
        assert boot.look_ahead(settings).weights_from.startswith(told)
    (disk,) = [r for r in found.room if r.what == "disk"]
    brought = sum(p.stat().st_size for folder in (base, adapter) for p in folder.iterdir())
    assert disk.needed_bytes == brought + (base / "model.safetensors").stat().st_size
    assert "merged" in disk.why
    boot.prepare(job.settings("rank-0/", base_model=f"file://{base}"))
    found = boot.look_ahead(job.settings("rank-0/", base_model=f"file://{base}"))
    assert {file.presence for file in found.base_files} == {"proved"}


def test_a_base_that_is_a_checkpoint(job: Job, adapter: Path, base: Path) -> None:
    job.put(adapter, "checkpoint-1")
    job.put(base, "base")
    found = boot.look_ahead(
        job.settings("rank-0/checkpoint-1/", base_model="checkpoint:job1/rank-0/base/")
    )
    assert (found.mode, found.base) == ("merge", None)
    assert any("merged" in r.why for r in found.room)


def test_a_whole_model_and_when_its_urls_end(job: Job, base: Path) -> None:
    job.put(base, "checkpoint-1")
    found = boot.look_ahead(job.settings("rank-0/"))
    assert (found.mode, found.consolidates) == ("as it is", False)
    assert found.urls_end is not None
    left = (found.urls_end - datetime.now(UTC)).total_seconds()
    assert 0 < left <= job.origin.lifetime_s
    job.origin.lifetime_s = -5
    found = boot.look_ahead(job.settings("rank-0/"), with_sizes=False)
    assert "URLs have ended" in found.warnings[0]


@pytest.mark.parametrize(
    ("gpu", "dtype", "fits"),
    [
        (40, "bfloat16", True),
        (24, "bfloat16", False),
        (24, "float32", True),
        (14, "float32", False),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_its_download(
    job: Job, base: Path, monkeypatch: pytest.MonkeyPatch, gpu: int, dtype: str, fits: bool
) -> None:
    """By the sizes of the listing: 30 GB, which vLLM halves where they are float32."""
    monkeypatch.setattr(room, "is_cpu_build", lambda: False)
    machine = Machine((Gpu(gpu * GB, None),), 64 * GB, GB)
    monkeypatch.setattr(room, "read_machine", lambda: machine)
    monkeypatch.setattr(forecasts, "read_machine", lambda: machine)
    place = job.put(base, "checkpoint-1")
    config = json.loads((place / "config.json").read_text()) | {"dtype": dtype}
    (place / "config.json").write_text(json.dumps(config))
    settings = job.settings("rank-0/")
    listing = json.loads((job.folder / "job1.json").read_text())
    for entry in listing["checkpoint_artifacts"]:
        large = entry["relative_file_name"].endswith("model.safetensors")
        size = (place / Path(entry["relative_file_name"]).name).stat().st_size
        entry["size_bytes"] = 30 * GB if large else size
    (job.folder / "job1.json").write_text(json.dumps(listing))
    found = boot.look_ahead(settings)
    assert any("not enough GPU memory" in warning for warning in found.warnings) is not fits
    job.origin.requests.clear()
    with pytest.raises(LoaderError) as caught:  # what fits is not as large as it says
        boot.prepare(settings)
    assert isinstance(caught.value, EngineError) is not fits
    if not fits:
        assert "model.safetensors" not in str([path for path, _ in job.origin.requests])
        assert "wanted" in caught.value.problems[0]


def test_plan_start_and_failure_say_the_same_of_memory_that_is_not_free(
    job: Job, base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    machine = Machine((), 100 * GB, GB, Node(100 * GB, 50 * GB))
    for place in (room, forecasts, failures):
        monkeypatch.setattr(place, "read_machine", lambda: machine)
    monkeypatch.setattr(room, "is_cpu_build", lambda: True)
    job.put(base, "checkpoint-1")  # of a size that the listing does not tell
    settings = job.settings("rank-0/", base_model=None)
    (told,) = [w for w in boot.look_ahead(settings).warnings if "memory now" in w]
    line = told.removeprefix("not enough ")
    assert line.startswith("memory now: 92.0 GB wanted (vLLM takes 92% of all, unless VLLM_CPU_")
    boot.prepare(settings)
    assert caplog.messages.count(f"this may be too little: {line}") == 1
    error = failures.start_failure(ValueError("no"), "model", settings.engine_args)
    assert line in error.problems
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert not [w for w in boot.look_ahead(settings).warnings if "memory now" in w]
    assert not failures.start_failure(ValueError("no"), "model", settings.engine_args).problems


def test_a_folder_that_cannot_be_written_is_told_by_plan(
    job: Job, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.put(base, "checkpoint-1")
    assert not any("cannot write" in w for w in boot.look_ahead(job.settings("rank-0/")).warnings)
    monkeypatch.setattr("loader.prepare.forecast.os.access", lambda path, mode: False)
    told = [w for w in boot.look_ahead(job.settings("rank-0/")).warnings if "cannot write" in w]
    assert told == [f"user {os.getuid()} cannot write {job.root.parent}"]


def test_more_than_one_start_can_serve_is_told_by_plan(
    job: Job, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.put(base, "checkpoint-1")
    job.put(base, "checkpoint-2")
    for paths in (("rank-0/",), ("rank-0/checkpoint-1/", "rank-0/checkpoint-2/")):
        found = boot.look_ahead(job.settings(*paths))
        assert found.mode == ""
        assert "whole models: job1/rank-0/ch" in found.warnings[0]
    with pytest.raises(LoaderError):
        boot.prepare(job.settings("rank-0/"))
    job.put(adapter, "lora")
    beside = ("rank-0/checkpoint-1/", "rank-0/lora/")
    assert "beside adapters" in boot.look_ahead(job.settings(*beside)).warnings[0]
    base_is_one = job.settings(*beside, base_model="checkpoint:job1/rank-0/checkpoint-1/")
    assert boot.look_ahead(base_is_one).mode
