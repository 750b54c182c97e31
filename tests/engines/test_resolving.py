"""What pip installs beside podloader: there is a solution, with the newest proved vLLM in it."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest

from loader.serve.vllm.releases import PROVED

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"
_LINUX = "x86_64-manylinux_2_28"


def resolve(requirements: Path | str, python: str, *extras: str) -> dict[str, str]:
    """Return package -> version for *requirements*, a project's file or ``-``'s one line.

    Raises:
        CalledProcessError: there is no solution, or no index.
    """
    source = str(requirements) if isinstance(requirements, Path) else "-"
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header"]
    command += ["--no-annotate", "--python-version", python, "--python-platform", _LINUX]
    command += [word for extra in extras for word in ("--extra", extra)]
    done = subprocess.run(
        [*command, source],
        input=None if isinstance(requirements, Path) else requirements,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = (line.partition("==") for line in done.stdout.splitlines())
    return {name: version for name, equals, version in lines if equals}


@functools.cache
def index_is_silent() -> str:
    """Return why nothing can be resolved here, empty where it can."""
    try:
        resolve("msgspec", "3.12")
    except AssertionError as error:
        return str(error).splitlines()[0]
    return ""


@pytest.mark.engine
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("extras", [("vllm",), ("vllm", "audio", "telemetry"), ("transformers",)])
def test_there_is_a_solution(python: str, extras: tuple[str, ...]) -> None:
    if reason := index_is_silent():
        pytest.skip(f"no package index: {reason}")
    found = resolve(_PROJECT, python, *extras)
    assert found.get("vllm") == (PROVED[-1] if "vllm" in extras else None)
    assert {"torch", "transformers"} <= found.keys()
    assert ("soundfile" in found) or "audio" not in extras
