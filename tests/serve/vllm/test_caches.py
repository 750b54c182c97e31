"""vLLM's cache: what is said where nothing can be kept in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SAID = """
import os, sys
sys.path.insert(0, ".")
from loader.serve.vllm import private
private.VLLM_CACHE_ROOT = sys.argv[1]  # vllm itself takes seconds to import
from loader.serve.vllm.caches import unwritable_cache
os.setuid(12345)
print(unwritable_cache())
"""


def said(root: str | Path) -> str:
    """Return what a process of a user without a name says."""
    if os.getuid():
        pytest.skip("only root may be another user")
    command = [sys.executable, "-c", _SAID, str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    return tmp_path


def test_an_empty_one_that_cannot_be_written(folder: Path) -> None:
    for root in (folder, folder / "not/there"):
        told = said(root)
        assert f"{root}, is empty and user 12345 cannot write it" in told
        assert "mount a volume there" in told


def test_one_that_can_be_written(folder: Path) -> None:
    folder.chmod(0o777)
    assert said(folder) == said(folder / "new") == ""


def test_a_full_one_may_be_read_only(folder: Path) -> None:
    (folder / "torch_compile_cache").mkdir()
    assert said(folder) == ""


def test_no_home_leaves_a_folder_of_that_name() -> None:
    assert "set VLLM_CACHE_ROOT" in said("~/.cache/vllm")
