"""A base on the Hub: its headers prove that the adapter fits before its weights are fetched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from loader.units import show_bytes
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import FaultyOrigin
from tests.prepare.test_adapted import four_bits
from tests.stores.hub import Hub
from tests.test_boot import Job


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    found = Hub(tiny_llama(tmp_path / "repo"))
    yield found
    found.shutdown()
    found.server_close()


def prepare(job: Job, hub: Hub, adapter: Path, **own: Any) -> subprocess.CompletedProcess[str]:
    with preparing(job, hub, adapter, **own) as process:
        _, told = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, "", told)


def preparing(job: Job, hub: Hub, adapter: Path, **own: Any) -> subprocess.Popen[str]:
    """Return a ``podloader prepare`` of *adapter* over the Hub's model, with a timeline."""
    if not (job.origin.folder() / adapter.name).exists():
        job.put(adapter, adapter.name)
    settings = job.settings(f"rank-0/{adapter.name}/")
    config = job.folder / "config.yaml"
    references = [{"training_job_id": "job1", "paths": [f"rank-0/{adapter.name}/"]}]
    checkpoints = {"download_folder": str(job.root), "artifact_references": references}
    own |= {"artifacts": list(settings.artifacts), "base_model": "org/base"}
    config.write_text(
        yaml.safe_dump({"training_checkpoints": checkpoints, "model_metadata": {"podloader": own}})
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(job.folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    timeline = job.folder / "boot.json"
    command = [sys.executable, "-m", "loader", "prepare", str(config), "--timeline", str(timeline)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_an_adapter_is_checked_against_the_hubs_headers(
    hub: Hub, origin: FaultyOrigin, tmp_path: Path
) -> None:
    job = Job(origin, tmp_path)
    other = tiny_llama(tmp_path / "other", hidden_size=64, tokenizer=False)
    done = prepare(job, hub, train_or_draw_lora(other, tmp_path / "misfit"))
    assert done.returncode == 5, done.stderr
    assert "does not fit its base" in done.stderr
    assert done.stderr.count("the base has (128, 128)") == 2
    assert not weights_here(tmp_path)
    done = prepare(job, hub, train_or_draw_lora(hub.folder, tmp_path / "fits"))
    assert done.returncode == 0, done.stderr
    assert weights_here(tmp_path)


@pytest.mark.parametrize(
    ("named", "own", "asked"),
    [
        ("org/base", {}, "v2"),
        ("org/base", {"base_revision": "v3"}, "v3"),
        ("org/other", {}, None),
    ],
)
def test_the_revision_that_an_adapter_names(
    hub: Hub, origin: FaultyOrigin, tmp_path: Path, named: str, own: Any, asked: str | None
) -> None:
    """PEFT's rule: of the base that its config names; the setting wins."""
    adapter = train_or_draw_lora(hub.folder, tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": named, "revision": "v2"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    done = prepare(Job(origin, tmp_path), hub, adapter, **own)
    assert done.returncode == 0, done.stderr
    first = next(path for path, _ in hub.requests if path.startswith("/api/models/"))
    assert first == "/api/models/org/base" + (f"/revision/{asked}" if asked else "")


def weights_here(folder: Path) -> list[Path]:
    return list((folder / "home").rglob("*.safetensors"))


MERGE = {"adapter_policy": "merge", "dequantise": True}


@pytest.mark.parametrize("own", [{"adapter_policy": "attach"}, MERGE], ids=["attach", "merge"])
def test_an_adapter_is_checked_against_a_quantised_base(
    hub: Hub, origin: FaultyOrigin, tmp_path: Path, own: dict[str, Any]
) -> None:
    """Of four bits, whose shapes are told by texts among the weights: they are read by ranges."""
    job = Job(origin, tmp_path)
    other = tiny_llama(tmp_path / "other", hidden_size=64, tokenizer=False)
    misfit = train_or_draw_lora(other, tmp_path / "misfit")
    fits = train_or_draw_lora(hub.folder, tmp_path / "fits")
    hub.folder = four_bits(hub.folder, tmp_path / "quantised")
    done = prepare(job, hub, misfit, **own)
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("the base has (128, 128)") == 2
    assert not weights_here(tmp_path)
    done = prepare(job, hub, fits, **own)
    assert done.returncode == 0, done.stderr
    assert f"adapters: {own['adapter_policy']}" in done.stderr


def test_a_merge_into_a_quantised_base_is_refused(
    hub: Hub, origin: FaultyOrigin, tmp_path: Path
) -> None:
    adapter = train_or_draw_lora(hub.folder, tmp_path / "adapter")
    hub.folder = four_bits(hub.folder, tmp_path / "quantised")
    done = prepare(Job(origin, tmp_path), hub, adapter, adapter_policy="merge")
    assert done.returncode == 5, done.stderr
    assert "cannot take up an adapter" in done.stderr
    assert not weights_here(tmp_path)


def test_a_hub_without_ranges_tells_after_the_download(
    hub: Hub, origin: FaultyOrigin, tmp_path: Path
) -> None:
    other = tiny_llama(tmp_path / "other", hidden_size=64, tokenizer=False)
    misfit = train_or_draw_lora(other, tmp_path / "misfit")
    hub.folder = four_bits(hub.folder, tmp_path / "quantised")
    hub.ranges = False
    done = prepare(Job(origin, tmp_path), hub, misfit, adapter_policy="attach")
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("the base has (128, 128)") == 2


def test_the_bases_download_is_told_of(hub: Hub, origin: FaultyOrigin, tmp_path: Path) -> None:
    job = Job(origin, tmp_path)
    adapter = train_or_draw_lora(hub.folder, tmp_path / "fits")
    done = prepare(job, hub, adapter)
    assert done.returncode == 0, done.stderr
    weights = (hub.folder / "model.safetensors").stat().st_size
    small = sum(path.stat().st_size for path in hub.folder.iterdir()) - weights
    files = len(list(hub.folder.iterdir()))
    for count, size in ((files - 1, show_bytes(small)), (1, show_bytes(weights))):
        assert f"fetching {count} files, {size}" in done.stderr
        assert f"{count}/{count} files, {size} of {size}" in done.stderr


def test_every_file_of_the_base_is_a_span(hub: Hub, origin: FaultyOrigin, tmp_path: Path) -> None:
    job = Job(origin, tmp_path)
    adapter = train_or_draw_lora(hub.folder, tmp_path / "fits")
    hub.wait_s = 0.1
    for cached in (False, True):
        done = prepare(job, hub, adapter)
        assert done.returncode == 0, done.stderr
        events = json.loads((tmp_path / "boot.json").read_text())
        spans = [event for event in events["traceEvents"] if event["ph"] == "X"]
        of_base = [s for s in spans if s["cat"] == "file" and s["name"].startswith("org/base/")]
        if cached:
            assert not of_base
            assert events["otherData"]["cache_hits"] >= len(list(hub.folder.iterdir()))
            return
        assert {s["name"] for s in of_base} == {f"org/base/{p.name}" for p in hub.folder.iterdir()}
        assert "cache_hits" not in events["otherData"]
        stages = {s["name"]: s for s in spans if s["cat"] == "stage"}
        for span in of_base:
            weights = span["name"].endswith(".safetensors")
            stage = stages["download of the base" if weights else "download of small files"]
            assert stage["ts"] <= span["ts"]
            assert span["ts"] + span["dur"] <= stage["ts"] + stage["dur"]
        assert "download of the base" in (tmp_path / "boot.svg").read_text()


def test_a_signal_does_not_wait_for_the_bases_rest(
    hub: Hub, origin: FaultyOrigin, tmp_path: Path
) -> None:
    job = Job(origin, tmp_path)
    adapter = train_or_draw_lora(hub.folder, tmp_path / "fits")
    hub.pause_s = 60.0
    with preparing(job, hub, adapter) as process:
        assert process.stderr is not None
        assert any("fetching 1 files" in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(20) == 143
        assert time.monotonic() - began < 5
