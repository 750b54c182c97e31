"""A release of vLLM that runs on a CPU: its Python over the compiled parts of the CPU build.

The CPU build follows some weeks behind. A release that it does not have yet takes the parts of the
one before; whether that goes together, a bare ``LLM(...)`` tells (``runs``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from loader.serve.vllm.releases import PROVED
from tests.engines.sources import CACHE, UnavailableError, compiled_of, sources_of

_BARE = """
import sys
from vllm import LLM, SamplingParams
model = LLM(sys.argv[1], dtype="float32", max_model_len=64, enforce_eager=True)
print("answered", len(model.generate("a", SamplingParams(max_tokens=2))[0].outputs[0].token_ids))
"""
_BARE_S = 300
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


def environment_of(overlay: Path) -> dict[str, str]:
    """Return this process's environment with *overlay* before everything else."""
    path = os.pathsep.join(filter(None, [str(overlay), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "VLLM_CPU_KVCACHE_SPACE": "1"}


def fails_bare(overlay: Path, model: Path) -> str:
    """Return why a bare ``LLM(model)`` does not answer on *overlay*, empty where it does."""
    command = [sys.executable, "-c", _BARE, str(model)]
    try:
        done = subprocess.run(
            command,
            env=environment_of(overlay),
            cwd=model,
            capture_output=True,
            text=True,
            timeout=_BARE_S,
        )
    except subprocess.TimeoutExpired:
        return f"no answer after {_BARE_S} s"
    if done.returncode or "answered 2" not in done.stdout:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return ""


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
