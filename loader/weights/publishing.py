"""A folder that appears complete or not at all.

::

    <parent>/.<name>.<random>.partial/     being written; locked by its writer while it lives
    <parent>/<name>/                       the same folder, renamed when all of it is there
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from loader.errors import DiskError


class PartialFolder:
    """Context manager: ``path`` is the unpublished folder; leaving without an error publishes it.

    What a killed writer left beside *folder* is removed on entering.
    """

    def __init__(self, folder: Path, *, needed_bytes: int = 0) -> None:
        self.folder = folder
        self.path = folder
        self._needed_bytes = needed_bytes
        self._lock: int | None = None

    def __enter__(self) -> Self:
        parent = self.folder.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _sweep(self.folder)
            free = shutil.disk_usage(parent).free
            if free < self._needed_bytes:
                raise DiskError(
                    "not enough free space",
                    where=str(parent),
                    expected=f"{self._needed_bytes} bytes",
                    got=f"{free} bytes",
                    next_step="free some space, or choose another output folder",
                )
            self.path = Path(tempfile.mkdtemp(".partial", f".{self.folder.name}.", parent))
            self.path.chmod(0o755)
            self._lock = _lock(self.path)
        except OSError as error:
            self._leave()
            raise disk_error(self.folder, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                _publish(self.path, self.folder)
        except OSError as problem:
            raise disk_error(self.folder, problem) from problem
        finally:
            self._leave()

    def _leave(self) -> None:
        if self.path != self.folder:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def disk_error(folder: Path, error: OSError) -> DiskError:
    """Return what to raise when the disk refuses to hold *folder*."""
    return DiskError(
        "the disk refused a folder of results",
        where=str(folder),
        got=str(error),
        next_step="free some space, or choose another output folder",
    )


def _publish(partial: Path, folder: Path) -> None:
    if not folder.exists():
        partial.replace(folder)
        return
    # A folder cannot replace a full one in one step: the old one steps aside, and back on failure.
    aside = Path(tempfile.mkdtemp(".partial", f".{folder.name}.", folder.parent))
    folder.replace(aside / "old")
    try:
        partial.replace(folder)
    except OSError:
        (aside / "old").replace(folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _lock(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(folder: Path) -> None:
    for left in folder.parent.glob(f".{folder.name}.*.partial"):
        if (lock := _lock(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
