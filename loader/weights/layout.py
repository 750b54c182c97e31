"""Folders of a download without their ranks: what several nodes wrote at one place is one place.

::

    <root>/<job>/rank-<N>/<relative folder>/<file>     as a download lays files out
    <root>/rank-<N>/<relative folder>/<file>           the folder of one job
    <root>/<relative folder>/<file>                    any other folder
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

_RANK = re.compile(r"^rank-(\d+)$")


@dataclass(frozen=True, slots=True)
class Place:
    """A relative folder of a job and, for each rank that has it, the names of its files."""

    root: Path
    job: str
    relative: str
    files: Mapping[int | None, frozenset[str]]

    @property
    def ranks(self) -> tuple[int | None, ...]:
        """The ranks that have this folder, the lowest first; (None,) where there are no ranks."""
        return tuple(sorted(self.files, key=lambda rank: -1 if rank is None else rank))

    @property
    def names(self) -> frozenset[str]:
        """The names of all ranks together."""
        return frozenset().union(*self.files.values())

    @property
    def parent(self) -> str:
        """The relative folder above this one."""
        return self.relative.rpartition("/")[0]

    @property
    def base(self) -> str:
        """The last part of the relative folder."""
        return self.relative.rpartition("/")[2]

    def folder(self, rank: int | None) -> Path:
        """The folder of one rank on disk."""
        parts = [self.job, "" if rank is None else f"rank-{rank}", self.relative]
        return self.root.joinpath(*(p for p in parts if p))

    def holders(self, name: str) -> tuple[int | None, ...]:
        """The ranks whose folder has a file of that name."""
        return tuple(rank for rank in self.ranks if name in self.files[rank])


def walk_names(root: Path) -> list[str]:
    """Return all files below *root*, relative to it; hidden folders are left out.

    So are pipes, sockets and devices, which whoever opens them may wait for without an end.
    """
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        relative = Path(folder).relative_to(root)
        names += [
            (relative / file).as_posix()
            for file in files
            if not _is_special(os.path.join(folder, file))  # noqa: PTH118 - of thousands of files
        ]
    return names


def _is_special(path: str) -> bool:
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116
    except OSError:  # who opens it says what is wrong
        return False


def group_places(root: Path, names: Iterable[str]) -> tuple[Place, ...]:
    """Return the folders that *names* (relative to *root*) lie in, sorted by job and folder."""
    found: dict[tuple[str, str], dict[int | None, set[str]]] = {}
    for name in names:
        *folders, file = name.split("/")
        job, rank = "", None
        if len(folders) > 1 and (match := _RANK.match(folders[1])):
            job, rank, folders = folders[0], int(match[1]), folders[2:]
        elif folders and (match := _RANK.match(folders[0])):
            rank, folders = int(match[1]), folders[1:]
        place = found.setdefault((job, "/".join(folders)), {})
        place.setdefault(rank, set()).add(file)
    return tuple(
        Place(
            root,
            job,
            relative,
            MappingProxyType({rank: frozenset(files) for rank, files in ranks.items()}),
        )
        for (job, relative), ranks in sorted(found.items())
    )
