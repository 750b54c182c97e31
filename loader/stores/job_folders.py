"""Where the files of training jobs lie below a folder of a bucket or a file system.

::

    <root>/training_projects/<project>/jobs/<job>/rank-<N>/<relative_file_name>   the platform's
    <root>/<job>/rank-<N>/<relative_file_name>                                    several jobs
    <root>/rank-<N>/<relative_file_name>                                          one job alone

The root may be any folder on the way down.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from loader.errors import ListingError
from loader.types import JOB_ID, Artifact, Listing

RANK = re.compile(r"rank-(0|[1-9]\d{0,8})")
_PROJECTS, _JOBS = "training_projects", "jobs"
_COUNTED = 500  # files
_DEEPEST = 4  # training_projects, a project, jobs, a job


Count = Callable[[int], None]
"""Told of so many files more."""


def say_nothing(files: int) -> None:
    """Tell nobody of *files*."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file: ``path`` is relative to the folder that was asked about."""

    path: str
    size_bytes: int | None


class Tree(Protocol):
    """Folders of a place, named by paths without a slash at their ends."""

    def folders(self, path: str) -> Sequence[str]:
        """Return the names of the folders directly in *path*.

        Raises:
            FetchError: the place cannot be read.
        """

    def files(self, path: str) -> Iterator[StoredFile]:
        """Yield every file below *path*.

        Raises:
            FetchError: the place cannot be read.
        """

    def url(self, path: str) -> str:
        """Return how an artifact at *path* is named."""


@dataclass(frozen=True, slots=True)
class Listed:
    """Listings that are made by looking at a place's folders: a ``ListingSource``."""

    read: Callable[[], tuple[Listing, ...]]

    def has_news(self) -> bool:
        """Return True: files may have changed."""
        return True


def list_jobs(
    tree: Tree, root: str, jobs: Sequence[str], count: Count = say_nothing
) -> tuple[Listing, ...]:
    """Return the listings of *jobs* below *root*; *count* is told of files as they come.

    Where no job is named, of every job there. A folder without ranks is taken as it is, as rank 0
    of a job with its own name, where no other is asked for.

    Raises:
        ListingError: there is none, or it cannot be told which job a folder is of.
        FetchError: the place cannot be read.
    """
    found: dict[str, str] = {}
    for job, folder in _find(tree, root, tuple(jobs), _DEEPEST):
        if found.setdefault(job, folder) != folder:
            raise ListingError(
                "two folders of one job",
                where=tree.url(root),
                got=f"{tree.url(found[job])} and {tree.url(folder)}",
                next_step="give the URL of one of them",
            )
    name = root.rpartition("/")[2]
    name = name if JOB_ID.fullmatch(name) else "folder"
    if not found and set(jobs) <= {name}:
        whole = list_folder(tree, root, name, count)
        if whole.artifacts:
            return (whole,)
    if not found:
        raise ListingError(
            "no folder of a training job's ranks there",
            where=tree.url(root),
            expected=f"{_PROJECTS}/<project>/{_JOBS}/<job>/rank-<N>/…, or rank-<N>/…"
            + (f", of {', '.join(jobs)}" if jobs else ""),
            got=", ".join(tree.folders(root)[:10]) or "no folders",
            next_step="correct the URL in artifacts, or training_job_id",
        )
    return tuple(Listing(job, _artifacts(tree, job, path, count)) for job, path in found.items())


def find_jobs(tree: Tree, root: str) -> tuple[str, ...]:
    """Return the jobs below *root*, by the names of folders alone; none where that does not tell.

    Raises: as ``list_jobs``.
    """
    return tuple(dict(_find(tree, root, (), _DEEPEST)))


def list_folder(tree: Tree, root: str, job: str, count: Count = say_nothing) -> Listing:
    """Return everything below *root* as rank 0 of *job*: a model's folder, without ranks."""
    files = _counted(tree.files(root), count)
    return Listing(
        job,
        tuple(Artifact(job, 0, f.path, tree.url(f"{root}/{f.path}"), f.size_bytes) for f in files),
    )


def _find(tree: Tree, folder: str, jobs: tuple[str, ...], depth: int) -> Iterator[tuple[str, str]]:
    """Yield jobs and their folders."""
    parent, _, name = folder.rpartition("/")
    if name == _JOBS and jobs:
        below: Sequence[str] = jobs  # asked for one by one: a project may have thousands
    else:
        below = tree.folders(folder)
        if any(map(RANK.fullmatch, below)):
            if job := _job_of(tree, folder, name, parent.endswith(f"/{_JOBS}"), jobs):
                yield job, folder
            return
        if _PROJECTS in below or _JOBS in below:
            below = [_PROJECTS if _PROJECTS in below else _JOBS]
        elif jobs and name != _PROJECTS:
            below = [job for job in jobs if job in below]
    if depth:
        for name in (name for name in below if not name.startswith(".")):
            yield from _find(tree, f"{folder}/{name}", jobs, depth - 1)


def _job_of(
    tree: Tree, folder: str, name: str, among_jobs: bool, jobs: tuple[str, ...]
) -> str | None:
    """Return the job whose ranks lie in *folder*, None for one that was not asked for."""
    if name in jobs:
        return name
    if not jobs:
        return name if JOB_ID.fullmatch(name) else "job"
    if among_jobs:
        return None
    if len(jobs) == 1:
        return jobs[0]
    raise ListingError(
        "it cannot be told which job this folder is of",
        where=tree.url(folder),
        expected="a folder named by one of " + ", ".join(jobs),
        next_step="name the folder by its job, or give the folder that holds them all",
    )


def _counted(files: Iterator[StoredFile], count: Count) -> Iterator[StoredFile]:
    """Yield *files*, and tell *count* of so many at a time."""
    for number, file in enumerate(files, start=1):
        if number % _COUNTED == 0:
            count(_COUNTED)
        yield file


def _artifacts(tree: Tree, job: str, folder: str, count: Count) -> tuple[Artifact, ...]:
    artifacts = []
    for file in _counted(tree.files(folder), count):
        rank, _, name = file.path.partition("/")
        if name and RANK.fullmatch(rank):
            url = tree.url(f"{folder}/{file.path}")
            artifacts.append(Artifact(job, int(rank[5:]), name, url, file.size_bytes))
    return tuple(artifacts)
