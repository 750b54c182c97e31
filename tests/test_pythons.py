"""The network's rooms on each Python that podloader supports, where this machine has it.

``make pythons`` runs all their quick tests; the smoke here is what reaches into CPython. An
environment of a few wheels is made for each Python, in a cache folder: no torch, no engine.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "podloader-pythons"
_MINORS = ("3.11", "3.12", "3.13")
_HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
_FOR_TESTS = ("moto[server]", "numpy", "psutil", "pytest", "pytest-asyncio", "pytest-timeout")
_SMOKE = ("tests/http/test_sockets.py",)
_QUICK = ("tests/fetch", "tests/http", "tests/resolve", "tests/stores")
# What needs an engine's packages is not tried here.
_HEAVY = re.compile(r"^ *(from|import) (peft|safetensors|tokenizers|torch|transformers)\b", re.M)
_OURS = re.compile(r"^ *from (tests[\w.]*) import", re.M)


@pytest.mark.engine
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("minor", [minor for minor in _MINORS if minor != _HERE])
def test_sockets_and_tls(minor: str) -> None:
    python = environment(minor)
    tests = [*light_tests()] if os.environ.get("TEST_PYTHONS") == "all" else _SMOKE
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not engine"]
    done = subprocess.run([*command, *tests], cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def light_tests() -> Iterator[str]:
    """Return the files of ``_QUICK`` that do without an engine's packages."""
    for room in _QUICK:
        for path in sorted((_ROOT / room).glob("test_*.py")):
            if not _is_heavy(path):
                yield str(path)


@functools.cache
def _is_heavy(path: Path) -> bool:
    """Return whether a file of the tests, or one that it imports, needs an engine's packages."""
    text = path.read_text(encoding="utf-8")
    others = (_ROOT / f"{name.replace('.', '/')}.py" for name in _OURS.findall(text))
    return bool(_HEAVY.search(text)) or any(_is_heavy(f) for f in others if f.is_file())


def environment(minor: str) -> Path:
    """Return the Python of an environment with what the tests need, made where it is not there."""
    interpreter = find_python(minor)
    if interpreter is None:
        pytest.skip(f"no Python {minor} on this machine")
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [r for r in project["dependencies"] if not re.match(r"torch\b", r)]
    wanted += [
        *_FOR_TESTS,
        *(r for r in project["optional-dependencies"]["test"] if "trustme" in r),
    ]
    constraints = _ROOT / ".ci" / "constraints.txt"
    key = hashlib.sha256(f"{wanted}{constraints.read_text(encoding='utf-8')}".encode()).hexdigest()
    folder = _CACHE / f"{minor}-{key[:12]}"
    python = folder / "bin" / "python"
    if not (folder / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        uv = [sys.executable, "-m", "uv"]
        for command in (
            [*uv, "venv", "-q", "--python", interpreter, str(folder)],
            [*uv, "pip", "install", "-q", "--python", str(python), "-c", str(constraints), *wanted],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no environment for Python {minor}: {done.stderr.splitlines()[-1]}")
        (folder / "whole").touch()
    return python


def find_python(minor: str) -> str | None:
    """Return a Python of this version: one of pyenv's, or on PATH; a shim may not run."""
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [str(path) for path in sorted(versions.glob(f"{minor}.*/bin/python3"))]
    candidates += filter(None, [shutil.which(f"python{minor}")])
    for candidate in candidates:
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    return None
