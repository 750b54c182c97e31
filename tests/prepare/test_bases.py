"""Base models behind URLs: S3 and file systems, fetched once, only what an engine needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest

from loader.config.settings import Settings
from loader.errors import FetchError
from loader.prepare.bases import fetch_base

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
