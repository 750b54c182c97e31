"""What compiled kernels are good for: the machine, the image, and the arguments of vLLM.

vLLM's own keys decide what it takes of a cache; these decide which archive a pod asks for.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from loader.serve.machine import query_gpus
from loader.serve.vllm.releases import installed_release

_PACKAGES = ("torch", "triton", "flashinfer-python")
_PACKAGE_FOLDERS = ("site-packages", "dist-packages")
_RECORDS = (".dist-info", ".egg-info")
_CPU_FLAGS = re.compile(r"^(?:flags|Features)\s*:\s*(.+)$", re.MULTILINE)
_OS_RELEASE = Path("/etc/os-release")
_CPUINFO = Path("/proc/cpuinfo")
_AMD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
_AMD_DRIVER = Path("/sys/module/amdgpu/version")
# Arguments about the door, names and talk, which no kernel depends on; there are secrets among
# them, and addresses that differ from pod to pod.
_OUTSIDE = re.compile(
    r"host|port|uds|root-path|ssl-.*|.*enable-ssl-.*|api-key|hf-token|allowed-.*|middleware"
    r"|served-model-name|lora-modules|chat-template.*|response-role|tool-.*|.*tool-choice"
    r"|reasoning-parser.*|uvicorn-.*|h11-.*|shutdown-timeout|otlp-.*|.*log-.*|.*-log|.*log-requests"
    r"|.*-log-stats|data-parallel-address|master-addr|master-port|node-rank|headless"
)


def image_facts(words: Sequence[str]) -> dict[str, object]:
    """Return what an image and the *words* of ``vllm serve`` make of it. Quick.

    An image's id is not told inside of it: its packages, by name and version, and its system stand
    for it.
    """
    return {
        "vllm": installed_release(),
        "packages": _digest(sorted(_installed())),
        "system": _digest([_read(_OS_RELEASE), *platform.libc_ver()]),
        "python": sys.version,
        "arguments": _digest(sorted(relevant_arguments(words))),
    }


def machine_facts() -> dict[str, object]:
    """Return what is told of processors, GPUs and their driver. May take a moment."""
    flags = _CPU_FLAGS.search(_read(_CPUINFO))
    gpus = {tuple(row[2:]) for row in query_gpus("name,compute_cap,driver_version")}
    return {
        "cpu": [platform.machine(), _digest(sorted(flags[1].split())) if flags else ""],
        "gpus": sorted(map(list, gpus)) or _amd_gpus(),
    } | {name: _version(name) for name in _PACKAGES}


def relevant_arguments(words: Sequence[str]) -> list[str]:
    """Return the arguments that may matter to what is compiled, as ``name=value …``."""
    found: list[list[str]] = []
    for word in words:
        if word.startswith("-") or not found:
            name, _, value = word.lstrip("-").partition("=")
            found.append([name.replace("_", "-"), *([value] if value else [])])
        else:
            found[-1].append(word)
    told = (one for one in found if not _OUTSIDE.fullmatch(one[0].removeprefix("no-")))
    return ["=".join((one[0], " ".join(one[1:]))) for one in told]


def facts_name(facts: Mapping[str, object]) -> str:
    """Return the name of what was made of *facts*."""
    return _digest([json.dumps(facts, sort_keys=True)])[:32]


def _installed() -> set[str]:
    """Return names and versions of the packages, as their folders tell them."""
    found: set[str] = set()
    for place in sys.path:
        if place.rstrip("/").endswith(_PACKAGE_FOLDERS):
            try:
                found.update(p.name for p in Path(place).iterdir() if p.suffix in _RECORDS)
            except OSError:
                continue
    return found


def _amd_gpus() -> list[str]:
    targets = [
        line.split()[1]
        for node in sorted(_AMD_NODES.glob("*/properties"))
        for line in _read(node).splitlines()
        if line.startswith("gfx_target_version ")
    ]
    found = [target for target in targets if target != "0"]  # a processor is a node, too
    return [*found, _read(_AMD_DRIVER).strip()] if found else []


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
