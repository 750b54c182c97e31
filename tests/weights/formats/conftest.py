"""Checkpoints that the frameworks themselves wrote, from jobs of several processes; once a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loader.config.settings import Settings
from loader.types import Checkpoint
from loader.weights.inspect import find_checkpoints
from tests.models import tiny_llama
from tests.origin import FaultyOrigin, write_listing

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


@pytest.fixture(scope="session")
def zero(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``jobs/zero.py`` leaves: a folder per case, and the universal one that was converted."""
    out = tmp_path_factory.mktemp("zero")
    run_job("zero.py", base, out, ranks=2)
    return out


@pytest.fixture(scope="session")
def verl(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``jobs/verl.py`` leaves: a folder per case."""
    out = tmp_path_factory.mktemp("verl")
    run_job("verl.py", base, out, ranks=4)
    return out


@pytest.fixture(scope="session")
def megatron(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``jobs/mcore.py`` leaves: a folder per case."""
    out = tmp_path_factory.mktemp("megatron")
    run_job("mcore.py", base, out, ranks=2)
    return out


@pytest.fixture
def configure(origin: FaultyOrigin, tmp_path: Path) -> Any:
    """Put a case's nodes behind signed URLs and return a config that asks for all of them."""

    def put(case: Path, **own: Any) -> dict[str, Any]:
        for folder in case.glob("rank-*"):
            rank = int(folder.name.removeprefix("rank-"))
            shutil.copytree(folder, origin.folder("job1", rank), dirs_exist_ok=True)
        listing = write_listing(origin, tmp_path / "job1.json")
        (name,) = {path.name for path in case.glob("rank-*/checkpoint-*")}
        reference = {"training_job_id": "job1", "paths": [f"rank-*/{name}/"]}
        return {
            "training_checkpoints": {
                "download_folder": str(tmp_path / "down"),
                "artifact_references": [reference],
            },
            "model_metadata": {"podloader": {"artifacts": [str(listing)]} | own},
        }

    return put


@pytest.fixture
def publish(configure: Any) -> Any:
    """Put a case's nodes behind signed URLs and return settings that ask for all of them."""
    return lambda case, **own: Settings.load(configure(case, **own))


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


def found(case: Path) -> Checkpoint:
    """Return the one checkpoint that the nodes of *case* wrote."""
    (checkpoint,) = find_checkpoints(case, names_of(case))
    return checkpoint


def names_of(case: Path) -> list[str]:
    """Return the files of all nodes."""
    return [p.relative_to(case).as_posix() for p in case.glob("rank-*/**/*") if p.is_file()]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return what the weight files of *folder* hold."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Assert that names, dtypes and every bit are the same."""
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].equal(tensor), name


def edit_config(folder: Path, **fields: object) -> None:
    """Write *fields* into the config.json of *folder*; None takes one away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.unlink()
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def copy_case(case: Path, target: Path) -> Path:
    """Copy what the nodes wrote, so that a test may damage it; hard links, replaced on change."""
    shutil.copytree(case, target, ignore=shutil.ignore_patterns("full.safetensors"))
    return target
