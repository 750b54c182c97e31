"""``make engines`` fails where a release lacks a name, and where there is no such release."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from loader.serve.vllm.releases import PROVED
from tests.engines import __main__ as engines
from tests.engines.overlay import Run
from tests.engines.sources import UnavailableError, sources_of


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the newest release's, of which nothing is run."""
    try:
        unpacked = sources_of(PROVED[-1])
    except UnavailableError as error:
        pytest.skip(str(error))
    copy = tmp_path / "sources"
    shutil.copytree(unpacked, copy, copy_function=os.symlink)
    monkeypatch.setattr(engines, "sources_of", lambda release: copy)
    monkeypatch.setattr(engines, "run_on", lambda *arguments, **options: Run.PASSED)
    return copy


@pytest.mark.engine
def test_one_name_that_was_renamed_in_the_unpacked_wheel(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert engines.main([PROVED[-1]]) == 0
    changed = sources / "vllm/entrypoints/launchers/launcher.py"
    text = changed.read_text(encoding="utf-8")
    changed.unlink()
    changed.write_text(text.replace("serve_http", "serve_all"), encoding="utf-8")
    assert engines.main([PROVED[-1]]) == 1
    said = capsys.readouterr().out
    assert f"vLLM {PROVED[-1]}: lacks\n  serve_http is in none of " in said


def test_a_release_that_there_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(release: str) -> Path:
        raise UnavailableError(f"vllm {release}: no such release")

    monkeypatch.setattr(engines, "sources_of", refuse)
    assert engines.main(["9.9.9"]) == 1
    assert "no such release" in capsys.readouterr().out
