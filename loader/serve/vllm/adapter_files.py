"""The files of adapters that are in an engine, as they were when it took them up.

vLLM reads an adapter again when it needs one that it had dropped for want of room, and ends when it
cannot. By then its folder may hold another version, or nothing. So each version that an engine
takes up has a folder of its own, whose name no other has had::

    <download folder>/.podloader/live/.engine.<random>.partial/     locked while its process lives
      <number>/adapter_config.json, adapter_model.*

Files that podloader fetched are linked: a fetch puts a new file in the old one's place. Others may
be written over, and are copied, to the folder for temporary files.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from loader.fetch.files import STATE
from loader.weights.publishing import disk_error, scratch_folder

_FILES = ("adapter_config.json", "adapter_model*")
_LIVE = "live"
_OWNER = "engine"


class AdapterFiles:
    """The folders of one engine's adapters; they go with ``close``."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._folders: dict[Path | None, Path] = {}

    def keep(self, folder: Path, number: int) -> Path:
        """Return a folder with the adapter that is in *folder* now.

        Raises:
            DiskError: the disk refused.
        """
        fetched = next((p for p in folder.absolute().parents if (p / STATE).is_dir()), None)
        if fetched and not os.access(fetched / STATE, os.W_OK):
            fetched = None
        if fetched not in self._folders:
            self._folders[fetched] = self._stack.enter_context(_open_folder(fetched))
        put = _link if fetched else shutil.copyfile
        kept = self._folders[fetched] / str(number)
        try:
            kept.mkdir()
            for file in (file for pattern in _FILES for file in folder.glob(pattern)):
                put(file.resolve(), kept / file.name)
        except OSError as error:
            shutil.rmtree(kept, ignore_errors=True)
            raise disk_error(kept, error) from error
        return kept

    def close(self) -> None:
        """Remove them all."""
        self._stack.close()


def _link(file: Path, other: Path) -> None:
    try:
        other.hardlink_to(file)
    except OSError:  # not on every file system
        shutil.copyfile(file, other)


@contextmanager
def _open_folder(fetched: Path | None) -> Iterator[Path]:
    if fetched is None:
        with tempfile.TemporaryDirectory(prefix="podloader-") as folder:
            yield Path(folder)
    else:
        with scratch_folder(fetched / STATE / _LIVE, _OWNER) as folder:
            yield folder
