"""A release of vLLM that runs on a CPU: its Python over the compiled parts of the CPU build.

The CPU build follows some weeks behind. A release that it does not have yet takes the parts of the
one before. Whether that goes together, a bare ``LLM(...)`` tells, wherever tests fail.
"""

from __future__ import annotations

import enum
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loader.serve.vllm.releases import PROVED
from tests.engines.sources import CACHE, UnavailableError, compiled_of, sources_of
from tests.models import tiny_llama

_BARE = """
import sys
from vllm import LLM, SamplingParams
model = LLM(sys.argv[1], dtype="float32", max_model_len=64, enforce_eager=True)
print("answered", len(model.generate("a", SamplingParams(max_tokens=2))[0].outputs[0].token_ids))
"""
_ROOT = Path(__file__).parents[2]
# What releases ask for beyond the newest CPU build's own requirements.
_BESIDE = ("orjson",)


def overlay_of(release: str) -> Path:
    """Return the folder to put on PYTHONPATH for *release*, made where it is not there yet.

    Raises:
        UnavailableError: a wheel cannot be had.
    """
    folder = CACHE / f"overlay-{release}"
    if folder.is_dir():
        return folder
    sources, compiled = sources_of(release), _nearest_compiled(release)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".new-") as new:
        made = Path(new, "overlay")
        shutil.copytree(sources, made)
        shutil.copytree(compiled, made, dirs_exist_ok=True)
        told = made / f"vllm-{release}+cpu.dist-info"
        told.mkdir()
        (told / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n", encoding="utf-8"
        )
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        done = subprocess.run([*command, str(made), *_BESIDE], capture_output=True, text=True)
        if done.returncode:
            raise UnavailableError(done.stderr.strip().splitlines()[-1])
        if not folder.exists():
            made.rename(folder)
    return folder


class Run(enum.Enum):
    """How tests on an overlay went."""

    PASSED = enum.auto()
    FAILED = enum.auto()
    NO_ENGINE = enum.auto()  # they failed, but so does vLLM without podloader


def run_on(release: str, tests: Sequence[str], *, quiet: bool = True) -> Run:
    """Return how *tests*, pytest's arguments, went on *release*; their output is shown on failure.

    Raises:
        UnavailableError: a wheel cannot be had.
    """
    overlay = overlay_of(release)
    told = "-q" if quiet else "-v"  # by name as it goes: a run that is cut short has told them
    command = [sys.executable, "-m", "pytest", told, "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, env=_environment_of(overlay), cwd=_ROOT, capture_output=quiet, text=True
    )
    if done.returncode == 0:
        return Run.PASSED
    if quiet:
        print(done.stdout)
    return Run.FAILED if _answers_bare(overlay) else Run.NO_ENGINE


def _environment_of(overlay: Path) -> dict[str, str]:
    own = dict(os.environ)
    own.pop("PYTHONDONTWRITEBYTECODE", None)  # each of many processes would compile it all anew
    path = os.pathsep.join(filter(None, [str(overlay), own.get("PYTHONPATH")]))
    return {**own, "PYTHONPATH": path, "VLLM_CPU_KVCACHE_SPACE": "1"}


def _answers_bare(overlay: Path) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_llama(Path(folder, "model"))
        done = subprocess.run(
            [sys.executable, "-c", _BARE, str(model)],
            env=_environment_of(overlay),
            cwd=folder,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        print(*done.stderr.strip().splitlines()[-3:], sep="\n")
    return "answered 2" in done.stdout


def _nearest_compiled(release: str) -> Path:
    older = [proved for proved in reversed(PROVED) if _key(proved) < _key(release)]
    for candidate in (release, *older):
        try:
            return compiled_of(candidate)
        except UnavailableError as error:
            reason = error
    raise reason


def _key(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".") if part.isdigit())
