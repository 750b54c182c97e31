"""Where the engine's processes come from, in a process of its own: a fork server is for good."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.planted import plant, planted_and_run

_STARTED = """
import os
from multiprocessing import forkserver
from loader.serve.vllm.forkserver import EngineContext, METHOD

def tell(pipe):
    pipe.send(({name: os.environ.get(name) for name in ("LATER", "OMP_NUM_THREADS", METHOD)}))

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "3"
    forkserver.ensure_running()
    os.environ["OMP_NUM_THREADS"] = "5"
    os.environ["LATER"] = "set when the server ran"
    context = EngineContext()
    here, there = context.Pipe()
    process = context.Process(target=tell, args=(there,))
    process.start()
    there.close()
    print(here.recv())
    process.join()
"""

_ASKED = """
import multiprocessing
from loader.serve.vllm.forkserver import start_forkserver

multiprocessing.set_forkserver_preload([])
start_forkserver()
from multiprocessing import forkserver
print(forkserver._forkserver._forkserver_pid is not None, forkserver._forkserver._preload_modules)
"""


_BESIDE = """
import os
from loader.serve.vllm import forkserver

if __name__ == "__main__":
    forkserver._PRELOADED = "colorsys"
    forkserver.start_forkserver()
    process = forkserver.EngineContext().Process(target=print, args=("here",))
    process.start()
    process.join()
    print(os.environ.get("PYTHONSAFEPATH"))
"""


def printed(path: Path, script: str, folder: Path | None = None, **environment: str) -> str:
    path.write_text(script)
    command = [sys.executable, str(path)]
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def test_a_process_has_its_starter_s_environment_but_for_what_openmp_has_read(
    tmp_path: Path,
) -> None:
    said = {
        "LATER": "set when the server ran",
        "OMP_NUM_THREADS": "3",
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    }
    assert printed(tmp_path / "started.py", _STARTED).strip() == str(said)


def test_vllm_s_own_variable_has_the_word(tmp_path: Path) -> None:
    assert printed(tmp_path / "asked.py", _ASKED, VLLM_WORKER_MULTIPROC_METHOD="spawn").split() == [
        "False",
        "[]",
    ]


def test_no_file_of_the_working_folder_is_run(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    plant(tmp_path / "here", ["colorsys", "multiprocessing", "selectors", "signal", "socket"])
    said = printed(tmp_path / "beside.py", _BESIDE, tmp_path / "here", PYTHONUNBUFFERED="1")
    assert said.split() == ["here", "None"]
    assert planted_and_run(tmp_path / "here") == []
