"""The wheel: built from the sources alone, installed into empty environments, and put to work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from email import message_from_bytes
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from safetensors.torch import load_file
from safetensors.torch import save_file as save

from loader.serve.vllm.releases import PROVED
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import serving, write_listing

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
VERSIONS = ("3.11", "3.12", "3.13")
LIBRARY = "loader/adapters/_lowrank.so"
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env={**environment, **variables},
        check=False,
    )


def build(folder: Path, **variables: str) -> Path:
    """Return the wheel of the sources; *variables* are the compiler's."""
    source = folder / "source"
    shutil.copytree(
        ROOT / "loader", source / "loader", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation")
    done = run(*pip, "--wheel-dir", folder, source, **variables)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="no compiler is here")
def test_one_wheel_for_every_python(wheel: Path) -> None:
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read(LIBRARY)
        (metadata,) = (name for name in archive.namelist() if name.endswith("/WHEEL"))
        assert message_from_bytes(archive.read(metadata))["Root-Is-Purelib"] == "false"
    # It runs wherever the processor does: it asks for no version of the C library.
    assert b"GLIBC_" not in library
    assert b"Py" not in library


def test_a_wheel_for_every_machine_where_no_compiler_is(tmp_path: Path) -> None:
    wheel = build(tmp_path, CC="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert LIBRARY not in archive.namelist()
        (metadata,) = (name for name in archive.namelist() if name.endswith("/WHEEL"))
        assert message_from_bytes(archive.read(metadata))["Root-Is-Purelib"] == "true"


def interpreter(version: str) -> Path:
    """Return a Python of *version*; skip where there is none."""
    pyenv = Path.home() / ".pyenv" / "versions"
    names = (shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python")))
    for path in (sys.executable if version == HERE else None, *names):
        if path and run(path, "-c", "import venv").returncode == 0:
            return Path(path)
    pytest.skip(f"Python {version} is not on this machine")


@pytest.fixture(scope="module", params=VERSIONS)
def installed(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """An environment with the wheel and what it asks for, but torch: 3 GB where a GPU might be."""
    folder = tmp_path_factory.mktemp(request.param)
    done = run(interpreter(request.param), "-m", "venv", "--without-pip", folder)
    assert done.returncode == 0, done.stderr
    python = folder / "bin" / "python"
    uv = (sys.executable, "-m", "uv", "pip", "install", "--python", python)
    needs = folder / "needs.txt"
    needs.write_text(
        "\n".join(line for line in requirements(wheel) if not line.startswith("torch"))
    )
    done = run(*uv, "--constraint", ROOT / ".ci" / "constraints.txt", "-r", needs)
    if done.returncode:
        pytest.skip(f"no index of packages: {done.stderr[-500:]}")
    done = run(*uv, "--offline", "--no-deps", wheel)
    assert done.returncode == 0, done.stderr
    yield folder
    shutil.rmtree(folder)


def requirements(wheel: Path) -> list[str]:
    """Return what the wheel asks for without any extra."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        lines = message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    return [line for line in lines if "extra ==" not in line]


def command(environment: Path, folder: Path) -> Run:
    """Return what runs ``podloader`` of *environment* in *folder*."""

    def podloader(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [environment / "bin" / "podloader", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            env={"PATH": os.environ["PATH"], "HOME": str(folder)},
            check=False,
        )

    return podloader


def test_plan_and_fetch(installed: Path, tmp_path: Path) -> None:
    podloader = command(installed, tmp_path)
    weights = {"w": torch.arange(2.0**16)}
    with serving(tmp_path / "origin") as origin:
        (origin.folder("job1") / "step-1").mkdir(parents=True)
        save(weights, origin.folder("job1") / "step-1" / "model.safetensors")
        write_listing(origin, tmp_path / "listing.json", "job1")
        references = [{"training_job_id": "job1", "paths": ["rank-0/step-1/"]}]
        document = {
            "training_checkpoints": {"download_folder": "down", "artifact_references": references},
            "model_metadata": {"podloader": {"artifacts": ["listing.json"]}},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(document))
        plan = podloader("plan", "config.yaml", "--json")
        assert plan.returncode == 0, plan.stderr
        assert json.loads(plan.stdout)["total_bytes"] > 2**18
        fetch = podloader("fetch", "config.yaml", "--json")
        assert fetch.returncode == 0, fetch.stderr
    (path,) = (tmp_path / "down").rglob("model.safetensors")
    assert torch.equal(load_file(path)["w"], weights["w"])


def test_the_compiled_part_is_loaded(installed: Path) -> None:
    place = "import loader, pathlib; print(pathlib.Path(loader.__file__).parent)"
    done = run(installed / "bin" / "python", "-P", "-c", place)
    package = Path(done.stdout.strip())
    assert installed in package.parents
    lanes = f"import ctypes; print(ctypes.CDLL({str(package.parent / LIBRARY)!r}).low_rank_lanes())"
    done = run(installed / "bin" / "python", "-c", lanes)
    assert int(done.stdout) in {0, 8, 16}, done.stderr


def test_merge(installed: Path, tmp_path: Path) -> None:
    lend_torch(installed)
    base = tiny_llama(tmp_path / "base")
    train_or_draw_lora(base, tmp_path / "lora", seed=1)
    podloader = command(installed, tmp_path)
    merge = podloader("merge", "--base", "base", "--adapter", "lora", "--output", "out", "--json")
    assert merge.returncode == 0, merge.stderr
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert before.keys() <= after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def lend_torch(environment: Path) -> None:
    """Let *environment* see torch: this one's, or what uv keeps for its version of Python."""
    (site,) = environment.glob("lib/python*/site-packages")
    if site.parent.name == f"python{HERE}":
        lent = Path(torch.__file__).parents[1]
        (site / "zz_torch.pth").write_text(f"{lent}\n")
        return
    (needs,) = (
        line for line in (ROOT / "pyproject.toml").read_text().splitlines() if '"torch>=' in line
    )
    requirement = Requirement(needs.strip().strip('",'))
    uv = (sys.executable, "-m", "uv", "pip", "install", "--offline", "--python")
    done = run(*uv, environment / "bin" / "python", str(requirement))
    if done.returncode:
        pytest.skip(f"no torch for {site.parent.name} in uv's cache")


@pytest.mark.engine
def test_an_empty_python_takes_the_newest_vllm_that_is_proved(wheel: Path, tmp_path: Path) -> None:
    made = run(interpreter("3.12"), "-m", "venv", "--without-pip", tmp_path / "python")
    assert made.returncode == 0, made.stderr
    uv = (sys.executable, "-m", "uv", "pip", "install", "--dry-run", "--python")
    done = run(*uv, tmp_path / "python/bin/python", f"{wheel}[vllm]")
    if done.returncode and "No solution" not in done.stderr:
        pytest.skip(f"no index of packages: {done.stderr[-500:]}")
    assert f" + vllm=={PROVED[-1]}\n" in done.stderr
