"""What lies in the ranks of a job on this disk, whoever laid it there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from loader.errors import DiskError
from loader.stores.job_folders import RANK
from loader.types import Artifact

_FILE = "file://"
_UNFINISHED = (
    ".aria2",
    ".crdownload",
    ".incomplete",
    ".part",
    ".partial",
)  # so other tools call it
_log = logging.getLogger("podloader")


def has_ranks(folder: Path) -> bool:
    """Return whether *folder* holds a job's ranks.

    Raises:
        DiskError: it cannot be read.
    """
    return bool(_ranks(folder))


def list_ranks(folder: Path, within: Sequence[Path], job: str) -> Iterator[Artifact]:
    """Yield all files of *job*, whose ranks lie in *folder*.

    Symlinks to folders are entered, but for those that lead out of *within*, or to where they are
    themselves. What by its name is a transfer that has not ended is no artifact.

    Raises:
        DiskError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise _unreadable(error, folder)

    for rank in _ranks(folder):
        if _leads_away(rank, within):
            continue
        for parent, folders, names in os.walk(rank, onerror=refuse, followlinks=True):
            folders[:] = [name for name in folders if not _leads_away(Path(parent, name), within)]
            for name in names:
                path = Path(parent, name)
                if name.endswith(_UNFINISHED):
                    _log.warning(
                        "%s is left out: so transfers are called that have not ended", path
                    )
                    continue
                own = path.relative_to(rank).as_posix()
                size_bytes = path.stat().st_size if path.exists() else None
                yield Artifact(job, int(rank.name[5:]), own, f"{_FILE}{path}", size_bytes)


def is_link_to(artifact: Artifact, other: Artifact) -> bool:
    """Return whether a file that ``list_ranks`` found is a symlink to the other."""
    here, there = (one.url.removeprefix(_FILE) for one in (artifact, other))
    return here != there and os.path.realpath(here) == os.path.realpath(there)


def _ranks(folder: Path) -> list[Path]:
    try:
        found = (path for path in folder.iterdir() if RANK.fullmatch(path.name))
        return sorted(path for path in found if path.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(error, folder) from None


def is_within(real: str, folders: Iterable[Path]) -> bool:
    """Return whether a resolved path lies below one of *folders*."""
    return any(Path(real).is_relative_to(os.path.realpath(folder)) for folder in folders)


def _leads_away(path: Path, within: Iterable[Path]) -> bool:
    """Return whether *path* is a symlink out of *within*, or to a folder that it lies in."""
    if not path.is_symlink():
        return False
    real = Path(os.path.realpath(path))
    if Path(os.path.realpath(path.parent)).is_relative_to(real):
        return True
    if is_within(str(real), within):
        return False
    _log.warning("%s leads out of the download folder, and is not looked into", path)
    return True


def _unreadable(error: OSError, folder: Path) -> DiskError:
    return DiskError(
        "a folder cannot be read",
        where=str(error.filename or folder),
        got=error.strerror or type(error).__name__,
        next_step="give this user the right to read it",
    )
