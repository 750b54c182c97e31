"""A machine without a home, an entry in passwd, or a folder for temporary files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loader.errors import DiskError
from loader.weights.publishing import temporary_folder
from tests.models import tiny_llama
from tests.origin import FaultyOrigin, write_listing

# What a user has that no passwd knows, in a container whose file systems are read-only.
_BARE = """
import pwd, sys, tempfile
def unknown(uid): raise KeyError(uid)
pwd.getpwuid = unknown
def none(): raise FileNotFoundError(2, "No usable temporary directory found")
tempfile.gettempdir = tempfile._get_default_tempdir = none
tempfile._gettempdir = none
sys.argv[0] = "podloader"
from loader.cli import main
main()
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", _BARE, *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("base", ["~/model", "~nobody-at-all/model"])
def test_no_home(origin: FaultyOrigin, tmp_path: Path, base: str) -> None:
    adapter = {"peft_type": "LORA", "r": 8}
    origin.put("a/adapter_config.json", json.dumps(adapter).encode())
    origin.put("a/adapter_model.safetensors", b"\x02\0\0\0\0\0\0\0{}")
    listing = write_listing(origin, tmp_path / "listing.json")
    references = [{"training_job_id": "job1", "paths": ["rank-0/a/"]}]
    config = {
        "training_checkpoints": {
            "download_folder": str(tmp_path / "down"),
            "artifact_references": references,
        },
        "model_metadata": {"podloader": {"artifacts": [str(listing)], "base_model": base}},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    assert run("fetch", str(path)).returncode == 0
    done = run("prepare", str(path))
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert "the base model is not there" in done.stderr


def test_no_folder_for_temporary_files(origin: FaultyOrigin, tmp_path: Path) -> None:
    tiny_llama(origin.folder() / "model")
    listing = write_listing(origin, tmp_path / "listing.json")
    done = run("inspect", str(listing))
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert "set TMPDIR" in done.stderr


def test_a_caller_s_error_is_his(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    with pytest.raises(DiskError, match="temporary"), temporary_folder():
        pass
