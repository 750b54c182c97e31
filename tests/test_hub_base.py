"""A base on the Hub: its headers prove that the adapter fits before its weights are fetched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from loader.fetch.progress import show_bytes
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import FaultyOrigin
from tests.stores.hub import Hub
from tests.test_boot import Job


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    found = Hub(tiny_llama(tmp_path / "repo"))
    yield found
    found.shutdown()
    found.server_close()


def prepare(job: Job, hub: Hub, adapter: Path) -> subprocess.CompletedProcess[str]:
    job.put(adapter, adapter.name)
    settings = job.settings(f"rank-0/{adapter.name}/")
    config = job.folder / "config.yaml"
    references = [{"training_job_id": "job1", "paths": [f"rank-0/{adapter.name}/"]}]
    checkpoints = {"download_folder": str(job.root), "artifact_references": references}
    own = {"artifacts": list(settings.artifacts), "base_model": "org/base"}
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
    return subprocess.run(
        [sys.executable, "-m", "loader", "prepare", str(config)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_adapter_is_checked_against_the_hubs_headers(
    hub: Hub, origin: FaultyOrigin, tmp_path: Path
) -> None:
    job = Job(origin, tmp_path)
    other = tiny_llama(tmp_path / "other", hidden_size=64, tokenizer=False)
    done = prepare(job, hub, train_or_draw_lora(other, tmp_path / "misfit"))
    assert done.returncode == 5, done.stderr
    assert "does not fit its base" in done.stderr
    assert done.stderr.count("the base has (128, 128)") == 2
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    done = prepare(job, hub, train_or_draw_lora(hub.folder, tmp_path / "fits"))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "home").rglob("*.safetensors"))


def test_the_bases_download_is_told_of(hub: Hub, origin: FaultyOrigin, tmp_path: Path) -> None:
    job = Job(origin, tmp_path)
    adapter = train_or_draw_lora(hub.folder, tmp_path / "fits")
    done = prepare(job, hub, adapter)
    assert done.returncode == 0, done.stderr
    size = sum(path.stat().st_size for path in hub.folder.iterdir())
    files = len(list(hub.folder.iterdir()))
    told = done.stderr + done.stdout
    assert re.search(rf"fetching \d+ files, {re.escape(show_bytes(size))}", told), told
    assert f"{files}/{files} files, {show_bytes(size)} of {show_bytes(size)}" in told, told
