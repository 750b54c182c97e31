"""Checkpoints that the frameworks themselves wrote, from jobs of several processes; once a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import tiny_llama

JOBS = Path(__file__).parent / "jobs"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose vocabulary does not divide evenly by any number of ranks."""
    return tiny_llama(tmp_path_factory.mktemp("base"), vocab_size=387)


@pytest.fixture(scope="session")
def fsdp(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``jobs/fsdp.py`` leaves: a folder per case."""
    out = tmp_path_factory.mktemp("fsdp")
    run_job("fsdp.py", base, out, ranks=4)
    return out


@pytest.fixture(scope="session")
def trainer(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``jobs/trainer.py`` leaves."""
    out = tmp_path_factory.mktemp("trainer")
    run_job("trainer.py", base, out, ranks=2)
    return out / "trainer"


def run_job(script: str, *arguments: Path, ranks: int) -> None:
    """Run a script of ``jobs`` under torchrun to its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(JOBS / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        raise AssertionError(f"{script} failed:\n{done.stderr[-4000:]}")


def copy_case(case: Path, target: Path) -> Path:
    """Copy what the nodes wrote, so that a test may damage it; hard links, replaced on change."""
    shutil.copytree(case, target, ignore=shutil.ignore_patterns("full.safetensors"))
    return target
