"""What this machine has for an engine: the memory of its GPUs, its own, and shared memory."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_GROUP = Path("/proc/self/cgroup")
_SHARED = Path("/dev/shm")
_CORES = Path("/sys/devices/system/cpu")
_ANSWER_S = 10
_QUERY = "memory.total,memory.free,mig.mode.current"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that a process here may use; None where the driver does not tell."""

    memory_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True, slots=True)
class Node:
    """The memory nearest to the first core that a process here may use, and what is free of it."""

    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """``memory_bytes`` is what this process may take: the machine's, or less in a container."""

    gpus: tuple[Gpu, ...]
    memory_bytes: int | None
    shm_bytes: int | None
    node: Node | None = None


def read_machine() -> Machine:
    """Return what is here. Asks ``nvidia-smi`` where there is one, which may take a moment."""
    limits = [*_memory_total(), *_cgroup_limits()]
    try:
        shared = shutil.disk_usage(_SHARED).total
    except OSError:
        shared = None
    seen = _visible(query_gpus(_QUERY), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Machine(tuple(map(_gpu, seen)), min(limits, default=None), shared, _read_node())


def _memory_total() -> Iterator[int]:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemTotal:"):
            yield int(line.split()[1]) * 1024


def _read_node() -> Node | None:
    """Return what vLLM's CPU build takes for the memory of its first worker.

    Source: ``get_memory_node_info`` in vllm/utils/cpu_resource_utils.py.
    """
    core = min(os.sched_getaffinity(0))
    nodes = sorted((_CORES / f"cpu{core}").glob("node[0-9]*"))
    told = {}
    for line in _lines(nodes[0] / "meminfo" if nodes else Path("/proc/meminfo")):
        name, _, value = line.partition(":")
        told[name.split()[-1]] = int(value.split()[0]) * 1024
    of_files = (told.get(name, 0) for name in ("Active(file)", "Inactive(file)", "SReclaimable"))
    with contextlib.suppress(KeyError):
        total, free = told["MemTotal"], told.get("MemAvailable", told["MemFree"] + sum(of_files))
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
        ):
            for text in _lines(_CGROUPS / limit):
                if text.isdecimal() and int(text) < total:
                    total = int(text)
                    taken = sum(map(int, _lines(_CGROUPS / used)))
                    free = max(0, min(free, total - taken))
        return Node(total, free)
    return None


def _cgroup_limits() -> Iterator[int]:
    """Yield the limits of this process's control group and of those above it, version 2 or 1."""
    for line in _lines(_GROUP):
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root, name = (
            (_CGROUPS / "memory", "memory.limit_in_bytes")
            if controllers
            else (_CGROUPS, "memory.max")
        )
        folder = root / group.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(root):
                break
            yield from (int(text) for text in _lines(place / name) if text.isdecimal())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def query_gpus(fields: str) -> list[list[str]]:
    """Return what ``nvidia-smi`` tells of each GPU here: its number, its id, and *fields*."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, f"--query-gpu=index,uuid,{fields}", "--format=csv,noheader,nounits"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ANSWER_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [row for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if row]


def _visible(rows: list[list[str]], named: str | None) -> Iterable[list[str]]:
    """Return those of *rows* that CUDA_VISIBLE_DEVICES names, by their numbers or their ids.

    Source: CUDA C++ Programming Guide, "Environment Variables": what follows one that is not there
    is not seen.
    """
    if named is None:
        return rows
    found = []
    for word in filter(None, map(str.strip, named.split(","))):
        if word.startswith("MIG-"):
            found.append(["", "", "", "", ""])  # a part of one, of which this does not tell
            continue
        row = next((r for r in rows if word == r[0] or r[1].startswith(word)), None)
        if row is None:
            break
        found.append(row)
    return found


def _gpu(row: list[str]) -> Gpu:
    _, _, total, free, mig = (*row, "", "", "", "", "")[:5]
    if mig == "Enabled" or not total.isdecimal():
        return Gpu(None, None)
    return Gpu(int(total) << 20, int(free) << 20 if free.isdecimal() else None)
