"""The folders of a download, held open: what is opened below them cannot be led elsewhere.

Where one of a path's folders is exchanged for a symlink, a path leads to another place from one
call to the next; a descriptor does not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
import threading
from functools import cached_property

_AS_FOLDER = os.O_DIRECTORY | os.O_CLOEXEC
# Regular files are not opened in another way by it; a FIFO would wait for its other end.
_AS_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MOST_OPEN = 128


class _Folder:
    """A folder's descriptor, open as long as somebody has it."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class Folders:
    """The folders below *root*, by their paths from there. Every method may be called from any
    thread, and raises the system's OSError.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._open: dict[str, _Folder] = {}
        self._known: dict[str, tuple[int, int]] = {}  # device and inode
        self._lock = threading.RLock()

    def open(self, folder: str, name: str, flags: int) -> int:
        """Return a descriptor of the regular file *name* in *folder*; a symlink is not followed."""
        at = self.hold(folder)
        fd = os.open(name, flags | _AS_FILE, 0o644, dir_fd=at.fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EEXIST, "what lies there is no file")
        return fd

    def create(self, folder: str, name: str, flags: int) -> int:
        """Return a descriptor of a new file *name* in *folder*, which is made for it.

        Raises:
            FileExistsError: something bears that name.
        """
        flags |= os.O_CREAT | os.O_EXCL | _AS_FILE
        try:
            at = self.hold(folder)
            return os.open(name, flags, 0o644, dir_fd=at.fd)
        except FileNotFoundError:
            at = self._make(folder)
            return os.open(name, flags, 0o644, dir_fd=at.fd)

    def stat(self, folder: str, name: str) -> os.stat_result | None:
        """Return what the system says of *name* itself; None where there is none."""
        try:
            at = self.hold(folder)
            return os.stat(name, dir_fd=at.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def remove(self, folder: str, name: str) -> None:
        """Remove *name* where there is one."""
        try:
            at = self.hold(folder)
            os.unlink(name, dir_fd=at.fd)
        except FileNotFoundError:
            pass

    def rename(self, folder: str, name: str, to_folder: str, to_name: str) -> None:
        """Give a file another name, in a folder that is made for it."""
        source = self.hold(folder)
        try:
            target = self.hold(to_folder)
            os.rename(name, to_name, src_dir_fd=source.fd, dst_dir_fd=target.fd)
        except FileNotFoundError:
            target = self._make(to_folder)
            os.rename(name, to_name, src_dir_fd=source.fd, dst_dir_fd=target.fd)

    def is_ours(self, found: os.stat_result) -> bool:
        """Return whether a file is this user's or root's, and nobody else may write to it.

        On mounts that know no owners, every file is what a new one is there. Nobody writes through
        one that is read-only, whatever it says of owners: whoever mounted it vouches for it.
        """
        ours = found.st_uid in (os.geteuid(), 0) and not found.st_mode & stat.S_IWOTH
        return (
            ours
            or found.st_dev == self._read_only_device
            or (found.st_uid, found.st_mode & stat.S_IWOTH) == self._new_files
        )

    def moved(self) -> list[str]:
        """Return those folders that were opened which are not at their paths any more."""
        return [
            path for path, known in sorted(self._known.items()) if self._identity(path) != known
        ]

    @cached_property
    def _read_only_device(self) -> int | None:
        """Return the device below the root where that is mounted read-only, else None."""
        try:
            is_read_only = os.statvfs(self.root).f_flag & os.ST_RDONLY
            return os.stat(self.root).st_dev if is_read_only else None
        except OSError:
            return None

    @cached_property
    def _new_files(self) -> tuple[int, int] | None:
        """Return the owner of a file that is made here, and whether all may write to it."""
        try:
            with tempfile.TemporaryFile(dir=self.root) as file:
                found = os.fstat(file.fileno())
        except OSError:
            return None
        return found.st_uid, found.st_mode & stat.S_IWOTH

    def _identity(self, path: str) -> tuple[int, int] | None:
        try:
            found = os.stat(f"{self.root}/{path}", follow_symlinks=not path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def hold(self, path: str) -> _Folder:
        """Return the folder, whose descriptor is open for as long as this value is held."""
        return self._open.get(path) or self._find(path, make=False)

    def _make(self, path: str) -> _Folder:
        with self._lock:
            self._open.clear()  # it may have been removed with all that was in it
            return self._find(path, make=True)

    def _find(self, path: str, make: bool) -> _Folder:
        with self._lock:
            found = self._open.get(path)
            if found is not None:
                return found
            if path:
                parent, _, name = path.rpartition("/")
                fd = _open_folder(name, make, self._find(parent, make).fd)
            else:
                if make:
                    os.makedirs(self.root, exist_ok=True)
                fd = os.open(self.root, _AS_FOLDER)
            found = _Folder(fd)
            known = os.fstat(fd)
            self._known[path] = known.st_dev, known.st_ino
            while len(self._open) >= _MOST_OPEN:
                del self._open[next(iter(self._open))]
            self._open[path] = found
            return found


def _open_folder(name: str, make: bool, parent: int) -> int:
    flags = _AS_FOLDER | os.O_NOFOLLOW
    try:
        return os.open(name, flags, dir_fd=parent)
    except FileNotFoundError:
        if not make:
            raise
        with contextlib.suppress(FileExistsError):  # another thread or process was faster
            os.mkdir(name, dir_fd=parent)
        return os.open(name, flags, dir_fd=parent)
