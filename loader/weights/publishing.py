"""A folder that appears complete or not at all.

::

    <parent>/.<name>.<random>.partial/     being written; locked by its writer while it lives
    <parent>/.<name>.<plan>.partial/       the same, kept for the next run if its writer fails
    <parent>/<name>/                       the same folder, renamed when all of it is there
    <parent>/.<what>.<random>.partial/     room for what has no name yet; locked alike
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from loader.errors import DiskError
from loader.units import show_bytes


class PartialFolder:
    """Context manager: ``path`` is the unpublished folder; leaving without an error publishes it.

    What a killed writer left beside *folder* is removed on entering. With *plan*, which tells what
    is to be written from anything else, what a run with the same plan left is given again.
    """

    def __init__(self, folder: Path, *, needed_bytes: int = 0, plan: str = "") -> None:
        self.folder = folder
        self.path = folder
        self._needed_bytes = needed_bytes
        self._plan = plan
        self._kept = False
        self._lock: int | None = None

    def __enter__(self) -> Self:
        parent = self.folder.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            if self._plan:
                self._open_kept(parent / f".{self.folder.name}.{self._plan}.partial")
            sweep(parent, self.folder.name)
            check_room([(parent, self._needed_bytes - self._used_bytes())])
            if not self._kept:
                self.path = Path(tempfile.mkdtemp(".partial", f".{self.folder.name}.", parent))
                self._lock = lock_folder(self.path)
            self.path.chmod(0o755)
        except DiskError:
            self._leave()
            raise
        except OSError as error:
            self._leave()
            raise disk_error(self.folder, error) from error
        return self

    def _open_kept(self, path: Path) -> None:
        """Take the folder that outlives its writer, unless another process is writing it."""
        # That process has published it just now, or what lies there is no folder.
        with contextlib.suppress(FileNotFoundError, FileExistsError, NotADirectoryError):
            path.mkdir(exist_ok=True)
            lock = lock_folder(path)
            if lock is not None and not os.path.samestat(os.fstat(lock), path.stat()):
                os.close(lock)
            elif lock is not None:
                self._lock, self._kept, self.path = lock, True, path

    def _used_bytes(self) -> int:
        files = self.path.iterdir() if self._kept else ()
        return sum(512 * file.stat().st_blocks for file in files)

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
        if self.path != self.folder and not self._kept:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextlib.contextmanager
def scratch_folder(parent: Path, what: str) -> Iterator[Path]:
    """Give an empty folder in *parent*, to be renamed from or thrown away at the block's end.

    Raises:
        DiskError: the disk refused.
    """
    lock = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        sweep(parent, what)
        folder = Path(tempfile.mkdtemp(".partial", f".{what}.", parent))
        lock = lock_folder(folder)
    except OSError as error:
        raise disk_error(parent, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Give a folder for small files, which is gone at the block's end.

    Raises:
        DiskError: there is no place for one.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="podloader-", ignore_cleanup_errors=True)
    except OSError as error:
        raise DiskError(
            "there is no folder for temporary files",
            got=error.strerror or str(error),
            next_step="set TMPDIR to a folder that can be written to",
        ) from None
    with folder as name:
        yield Path(name)


_used: list[int] = []  # descriptors, until this process ends


def use(folder: Path) -> None:
    """Note that *folder* is used now, and by this process as long as it lives.

    On a disk that refuses that, it may be removed meanwhile.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _used.append(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.utime(descriptor)


@contextlib.contextmanager
def take(folder: Path) -> Iterator[bool]:
    """Give whether no process uses *folder*, which none does then until the block's end."""
    lock = lock_folder(folder)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


def check_room(needs: Iterable[tuple[Path, int]]) -> None:
    """Check that the bytes of *needs*, each below its folder, find room together.

    Raises:
        DiskError: they do not.
    """
    needed: Counter[int] = Counter()
    folders: dict[int, Path] = {}
    for folder, count in needs:
        folder.mkdir(parents=True, exist_ok=True)
        device = folder.stat().st_dev
        needed[device] += count
        folders.setdefault(device, folder)
    for device, count in needed.items():
        free = shutil.disk_usage(folders[device]).free
        if free < count:
            raise DiskError(
                "not enough free space",
                where=str(folders[device]),
                expected=f"{show_bytes(count)} free",
                got=f"{show_bytes(free)} free",
                next_step="free some space, or choose another output folder",
            )


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


def lock_folder(path: Path) -> int | None:
    """Return a descriptor that locks a folder until it is closed; None where another holds it.

    Raises:
        OSError: there is none; a symlink to one is none either.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def replace_file(path: Path, content: bytes) -> None:
    """Write the file *path* in one step, and nowhere else, whatever others have laid beside it.

    Raises:
        OSError: the disk refused.
    """
    descriptor, fresh = tempfile.mkstemp(".partial", f".{path.name}.", path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(descriptor, 0o644)
        Path(fresh).replace(path)
    except BaseException:
        Path(fresh).unlink(missing_ok=True)
        raise


def sweep(parent: Path, name: str, *, but: str | None = None) -> None:
    """Remove what writers of *name*, a pattern, left in *parent* when they failed or were killed.

    Those of living ones stay, and those of the name *but*.
    """
    for left in parent.glob(f".{name}.*.partial"):
        if but is not None and left.name.startswith(f".{but}."):
            continue
        try:
            lock = lock_folder(left)
        except OSError:  # its writer has just published or removed it
            continue
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
