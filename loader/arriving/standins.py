"""The one path that an engine is given, whatever it serves and whether it is here yet.

::

    <cache folder>/.engine-<n>/      nobody else's; locked by the process whose engine reads it
      model                          a symlink: to the stand-ins, then to the published folder
      stand-ins/                     config, tokenizer, index; weight files with headers and holes
        .stand-ins                   says so
      feed, lost                     the socket of ``loader.arriving.feed``; who lost it says why

Weights are never written into the stand-ins, and no weight file here is ever taken for one that is
whole: what reads them without following the feed is refused by the mark.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Self

from loader.arriving.feed import LOST
from loader.arriving.filling import FillingFolder
from loader.errors import DiskError
from loader.weights.publishing import disk_error, lock_folder

FEED = "feed"
_MARK = ".stand-ins"
_MODEL = "model"
_STAND_INS = "stand-ins"
_MOST_ENGINES = 64  # over one cache folder


class EnginePath:
    """``path`` leads to stand-ins of *filling*, and from ``publish`` on to the model itself."""

    def __init__(self, folder: Path, lock: int) -> None:
        self._folder = folder
        self._lock = lock
        self.path = folder / _MODEL
        self.feed = folder / FEED

    @classmethod
    def take(cls, cache: Path) -> Self:
        """Return the first path in *cache* that no other process has: as a rule, always the same.

        Raises:
            DiskError: the disk refused.
        """
        for number in range(_MOST_ENGINES):
            folder = cache / f".engine-{number}"
            try:
                folder.mkdir(0o700, parents=True, exist_ok=True)
                lock = lock_folder(folder)  # no symlink, so that no other folder is changed
                folder.chmod(0o700)
            except OSError as error:
                raise disk_error(folder, error) from error
            if lock is not None:
                return cls(folder, lock)
        raise DiskError(
            "too many engines over one cache folder",
            where=str(cache),
            expected=f"at most {_MOST_ENGINES}",
            next_step="give each its own: cache_folder",
        )

    def stand_in(self, filling: FillingFolder) -> None:
        """Let ``path`` lead to stand-ins of *filling*.

        Raises:
            DiskError: the disk refused.
        """
        folder = self._folder / _STAND_INS
        try:
            self._clear()
            folder.mkdir()
            (folder / _MARK).touch()
            for name, source in filling.small_files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, folder / name)
            for name, head in filling.heads.items():
                with (folder / name).open("wb") as file:
                    file.write(head.content)
                    file.truncate(head.size_bytes)
            self.publish(folder)
        except OSError as error:
            raise disk_error(folder, error) from error

    def publish(self, folder: Path) -> None:
        """Let ``path`` lead to *folder* from now on, in one step.

        Raises:
            DiskError: the disk refused.
        """
        fresh = self._folder / f".{_MODEL}"
        try:
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(folder, target_is_directory=True)
            fresh.replace(self.path)
        except OSError as error:
            raise disk_error(self.path, error) from error

    def clear(self) -> None:
        """Remove all but ``path``, which the engine may read again."""
        shutil.rmtree(self._folder / _STAND_INS, ignore_errors=True)
        for path in (self.feed, self.feed.with_name(LOST)):
            path.unlink(missing_ok=True)

    def release(self) -> None:
        """Remove all of it, and let another process have the path."""
        self._clear()
        os.close(self._lock)

    def _clear(self) -> None:
        self.clear()
        self.path.unlink(missing_ok=True)


def is_stand_in(folder: Path) -> bool:
    """Return whether the weight files in *folder* have holes where their tensors will be."""
    return (folder / _MARK).exists()
