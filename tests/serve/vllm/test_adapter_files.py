"""The files of adapters in an engine: what happens to their folders changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loader.errors import DiskError
from loader.fetch.files import STATE
from loader.serve.vllm.adapter_files import AdapterFiles

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "models/job1/rank-0/checkpoint-1"
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", WEIGHTS, "optimizer.pt"):
        (folder / name).write_text("first")
    return folder


@pytest.fixture
def fetched(adapter: Path, tmp_path: Path) -> Path:
    (tmp_path / "models" / STATE).mkdir()
    return adapter


def test_a_fetch_that_replaces_files_changes_no_version(fetched: Path, tmp_path: Path) -> None:
    files = AdapterFiles()
    first = files.keep(fetched, 1)
    assert sorted(file.name for file in first.iterdir()) == ["adapter_config.json", WEIGHTS]
    assert (first / WEIGHTS).samefile(fetched / WEIGHTS)
    (fetched / "new").write_text("second")
    (fetched / "new").replace(fetched / WEIGHTS)
    second = files.keep(fetched, 2)
    assert (first / WEIGHTS).read_text() == "first"
    assert (second / WEIGHTS).read_text() == "second"
    (fetched / WEIGHTS).unlink()
    assert (second / WEIGHTS).read_text() == "second"
    files.close()
    assert list((tmp_path / "models" / STATE / "live").iterdir()) == []


def test_files_of_others_may_be_written_over(adapter: Path) -> None:
    files = AdapterFiles()
    kept = files.keep(adapter, 1)
    (adapter / WEIGHTS).write_text("second")
    assert (kept / WEIGHTS).read_text() == "first"
    assert kept.parent.stat().st_mode & 0o77 == 0
    files.close()
    assert not kept.exists()


def test_what_a_killed_engine_left_goes_with_the_next(fetched: Path, tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from loader.serve.vllm.adapter_files import AdapterFiles
files = AdapterFiles()
files.keep(Path({str(fetched)!r}), 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    live = tmp_path / "models" / STATE / "live"
    alive = AdapterFiles()
    ours = alive.keep(fetched, 1)
    killed = subprocess.run([sys.executable, "-c", script], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(live.iterdir())) == 2
    other = AdapterFiles()
    other.keep(fetched, 1)
    assert len(list(live.iterdir())) == 2
    assert (ours / WEIGHTS).exists()
    alive.close()
    other.close()


def test_a_file_system_without_links(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    files = AdapterFiles()
    kept = files.keep(fetched, 1)
    assert (kept / WEIGHTS).read_text() == "first"
    assert not (kept / WEIGHTS).samefile(fetched / WEIGHTS)
    files.close()


def test_a_download_folder_that_cannot_be_written(
    fetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    files = AdapterFiles()
    assert not files.keep(fetched, 1).is_relative_to(tmp_path / "models")
    files.close()


def test_a_disk_that_refuses(fetched: Path, tmp_path: Path) -> None:
    (tmp_path / "models" / STATE / "live").write_text("in the way")
    with pytest.raises(DiskError):
        AdapterFiles().keep(fetched, 1)
