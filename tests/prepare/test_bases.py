"""Base models behind URLs: S3 and file systems, fetched once, only what an engine needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from safetensors.torch import load_file, save_file

from loader import boot
from loader.config.settings import Settings
from loader.errors import FetchError, LoaderError
from loader.prepare.bases import bring_base
from loader.prepare.checkpoint_sources import BaseModel
from loader.timeline import Timeline
from loader.weights.stored import find_weight_files, list_tensors
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import FaultyOrigin
from tests.test_boot import Job

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "original/consolidated.00.pth": b"again",
}


@pytest.fixture
def place(tmp_path: Path) -> str:
    system = fsspec.filesystem("memory")
    for name, content in FILES.items():
        system.pipe_file(f"/{tmp_path.name}/llama/{name}", content)
    return f"memory://{tmp_path.name}/llama/"


def settings(tmp_path: Path, **own: Any) -> Settings:
    return Settings.without_config({"cache_folder": str(tmp_path / "cache")} | own)


def fetch_base(settings: Settings, url: str, *, weights: bool = True) -> BaseModel:
    return bring_base(settings, url, Timeline(quiet=True), weights=weights)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_only_what_an_engine_needs(place: str, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="no safetensors"):
        fetch_base(settings(tmp_path), place)
    base = fetch_base(settings(tmp_path), place, weights=False)
    assert names(base.path) == {"config.json", "tokenizer.json"}
    assert tmp_path / "cache/bases" in base.path.parents
    base = fetch_base(settings(tmp_path, allow_pickle=True), place)
    assert names(base.path) == {"config.json", "tokenizer.json", "pytorch_model.bin"}


def test_what_it_is_made_from_is_told(place: str, tmp_path: Path) -> None:
    first = fetch_base(settings(tmp_path), place, weights=False)
    assert first.identity["url"] == place
    files = first.identity["files"]
    assert isinstance(files, dict)
    assert files["config.json"].startswith("crc64nvme:")
    assert fetch_base(settings(tmp_path), place, weights=False) == first
    fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/llama/config.json", b'{"a": 1}')
    assert fetch_base(settings(tmp_path), place, weights=False).identity != first.identity


def test_a_place_without_files(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="no files"):
        fetch_base(settings(tmp_path), f"memory://{tmp_path.name}/none")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model in shards, one of which has no number."""
    folder = tiny_llama(tmp_path / "sharded")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = ["model-00001-of-00002", "model-00002-of-00002", "model-extra"]
    placed = {name: f"{files[n % 3]}.safetensors" for n, name in enumerate(tensors)}
    for file in placed.values():
        save_file({n: tensors[n] for n in tensors if placed[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("kind", ["url", "folder", "checkpoint"])
@pytest.mark.parametrize("policy", ["auto", "attach", "merge"])
def test_a_shard_that_the_index_names(
    origin: FaultyOrigin, sharded: Path, tmp_path: Path, kind: str, policy: str
) -> None:
    """All of a base is taken, whatever its files are called; else nothing is fetched."""
    job = Job(origin, tmp_path)
    base = tiny_llama(tmp_path / "like")
    job.put(train_or_draw_lora(base, tmp_path / "adapter"), "a")
    job.put(sharded, "base", job="job2")
    named = {
        "url": sharded.as_uri(),
        "folder": str(sharded),
        "checkpoint": "checkpoint:job2/rank-0/base",
    }
    own: dict[str, Any] = {"base_model": named[kind], "adapter_policy": policy}
    ready = boot.prepare(job.settings("rank-0/a/", jobs=("job1", "job2"), **own))
    weights = find_weight_files(ready.path)
    assert len(list_tensors(weights)) == len(list_tensors(find_weight_files(base)))
    shutil.rmtree(tmp_path / "down")
    for folder in (sharded, origin.folder("job2") / "base"):
        (folder / "model-extra.safetensors").unlink()
    with pytest.raises(LoaderError) as error:
        boot.prepare(job.settings("rank-0/a/", jobs=("job1", "job2"), **own))
    assert "model-extra.safetensors" in str(error.value)
    assert not list((tmp_path / "down").rglob("model-0*.safetensors"))
