"""A folder by way of FUSE, as a network's file system: two mounts of one folder share no locks.

``python -m tests.shared_mount FOLDER MOUNTPOINT`` serves it in the foreground.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODULE = "tests.shared_mount"


def why_not() -> str:
    """Return why there can be no mount here, empty where there can."""
    if not os.access("/dev/fuse", os.W_OK) or os.geteuid() != 0:
        return "no /dev/fuse, or not root"
    try:
        import fuse  # noqa: F401
    except ImportError:
        return "no fuse-python"
    return ""


@contextmanager
def mounted(folder: Path, mountpoint: Path) -> Iterator[Path]:
    """Give *folder* as it is seen by way of a mount of its own."""
    mountpoint.mkdir(parents=True)
    command = [sys.executable, "-m", MODULE, str(folder), str(mountpoint)]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent) as server:
        try:
            while not os.path.ismount(mountpoint):
                assert server.poll() is None, "the mount has failed"
                time.sleep(0.02)
            yield mountpoint
        finally:
            subprocess.run(["umount", "-l", mountpoint], check=False)
            server.wait(10)


def main(folder: str, mountpoint: str) -> None:
    """Serve *folder* at *mountpoint* until it is unmounted."""
    import fuse

    fuse.fuse_python_api = (0, 2)

    def real(path: str) -> str:
        return folder + path

    class File:
        """An open file."""

        def __init__(self, path: str, flags: int, *mode: int) -> None:
            self.fd = os.open(real(path), flags & ~os.O_APPEND, *mode)
            self.direct_io = False
            self.keep_cache = False

        def read(self, length: int, offset: int) -> bytes:
            return os.pread(self.fd, length, offset)

        def write(self, data: bytes, offset: int) -> int:
            return os.pwrite(self.fd, data, offset)

        def release(self, flags: int) -> None:
            os.close(self.fd)

        def flush(self) -> None:
            os.close(os.dup(self.fd))

        def fsync(self, only_data: int) -> None:
            os.fsync(self.fd)

        def fgetattr(self) -> os.stat_result:
            return os.fstat(self.fd)

        def ftruncate(self, length: int) -> None:
            os.ftruncate(self.fd, length)

    class Passed(fuse.Fuse):  # type: ignore[misc]
        """Every call as it is."""

        def __init__(self) -> None:
            super().__init__()
            self.file_class = File

        def getattr(self, path: str) -> os.stat_result:
            return os.lstat(real(path))

        def readlink(self, path: str) -> str:
            return os.readlink(real(path))

        def readdir(self, path: str, offset: int) -> Iterator[object]:
            for name in (".", "..", *os.listdir(real(path))):
                yield fuse.Direntry(name)

        def unlink(self, path: str) -> None:
            os.unlink(real(path))

        def rmdir(self, path: str) -> None:
            os.rmdir(real(path))

        def symlink(self, target: str, path: str) -> None:
            os.symlink(target, real(path))

        def rename(self, path: str, to: str) -> None:
            os.rename(real(path), real(to))

        def link(self, path: str, to: str) -> None:
            os.link(real(path), real(to))

        def chmod(self, path: str, mode: int) -> None:
            os.chmod(real(path), stat.S_IMODE(mode))

        def chown(self, path: str, user: int, group: int) -> None:
            os.chown(real(path), user, group)

        def truncate(self, path: str, length: int) -> None:
            os.truncate(real(path), length)

        def mkdir(self, path: str, mode: int) -> None:
            os.mkdir(real(path), mode)

        def utime(self, path: str, times: tuple[float, float]) -> None:
            os.utime(real(path), times)

        def statfs(self) -> os.statvfs_result:
            return os.statvfs(folder)

        def mknod(self, path: str, mode: int, device: int) -> None:
            os.mknod(real(path), stat.S_IFREG | stat.S_IMODE(mode))

    server = Passed()
    server.parse(["-f", "-o", "nonempty,attr_timeout=0,entry_timeout=0", mountpoint])
    server.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
