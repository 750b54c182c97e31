"""The engine's imports begin with the download, and run beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loader.fetch.progress import LogProgress
from loader.import_lock import importing
from loader.serve.early_imports import EarlyImports
from loader.timeline import Timeline
from loader.weights.formats.expected import read_model_names
from tests.models import tiny_llama

_WHILE_S = 0.2
_BEGIN = """
import sys
from pathlib import Path
from loader.fetch.progress import LogProgress
from loader.serve.early_imports import EarlyImports
from loader.timeline import Timeline

timeline = Timeline()
imports = EarlyImports(sys.argv[1], Path("."), timeline, LogProgress())
imports.start(2, 100, 0)
assert not timeline.running
assert not {"torch", "transformers", "peft", "vllm"} & set(sys.modules)
imports.begin_file("a", 50, 0)
imports.begin_file("b", 50, 0)
imports.wait()
(stage,) = timeline.stages
print(stage.name, stage.lane, stage.failed, "peft" in sys.modules)
"""
_LOOK = """
import sys
from pathlib import Path
from loader.fetch.progress import LogProgress
from loader.serve.early_imports import EarlyImports
from loader.timeline import Timeline

if __name__ == "__main__":
    timeline = Timeline()
    imports = EarlyImports("vllm", Path("elsewhere"), timeline, LogProgress())
    imports.finish_file("org/base/config.json")
    imports.found_config(Path(sys.argv[1]))
    imports.wait()
    print(", ".join(span.name for span in timeline.stages))
"""


def begin(engine: str, **environment: str) -> str:
    """Return what a process of its own says of the imports of *engine*."""
    command = [sys.executable, "-c", _BEGIN, engine]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_they_begin_with_the_first_request() -> None:
    assert begin("transformers") == "engine import engine  True"


def test_a_failure_is_left_to_whoever_starts_the_engine(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise ImportError('libcudart.so.13')")
    assert begin("vllm", PYTHONPATH=str(tmp_path)) == "engine import engine ImportError False"


@pytest.mark.engine
def test_a_base_from_elsewhere_is_looked_at(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    command = [sys.executable, "-c", _LOOK, str(folder / "config.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[-2] == "engine import, model class", done.stderr


def test_they_run_beside_a_download() -> None:
    timeline = Timeline()
    imports = EarlyImports("transformers", Path(), timeline, LogProgress())
    with importing:  # so that they cannot be over
        imports.begin_file("a", 50, 0)
        imports.advance(50, "a")
        assert "imports" in [thread.name for thread in threading.enumerate()]
        assert not timeline.stages
    imports.wait()
    assert [span.name for span in timeline.stages] == ["engine import"]


def test_where_all_files_are_here_they_begin_at_once() -> None:
    timeline = Timeline()
    imports = EarlyImports("transformers", Path(), timeline, LogProgress())
    imports.start(2, 100, 100)
    imports.wait()
    assert [span.name for span in timeline.stages] == ["engine import"]


def test_other_threads_do_not_import_in_their_midst(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    other = threading.Thread(target=read_model_names, args=(folder,))
    with importing:
        other.start()
        other.join(_WHILE_S)
        assert other.is_alive()
    other.join()
