"""Everything else that fsspec has a driver for: ``gs://``, ``az://``, ``file://``, ``memory://`` …

Drivers know no ``If-Match``. So the object's version is looked at again when a range has been read,
before its last bytes are handed out: what passes was read while that version was there.
"""

from __future__ import annotations

import base64
import errno
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from loader.errors import (
    ChangedError,
    ConfigError,
    DeniedError,
    FetchError,
    LoaderError,
    TransientError,
)
from loader.http.objects import Checksum, ObjectInfo
from loader.stores.base import PendingResponse
from loader.stores.job_folders import StoredFile
from loader.types import Artifact

_CHUNK_BYTES = 4 << 20
# What drivers call that which changes with the object, the best first.
_VERSIONS = ("etag", "ETag", "generation", "mtime", "LastModified", "last_modified", "updated")
_LASTING = (errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO)  # asking again is in vain


class FsspecStore:
    """A ``Store`` of artifacts that fsspec reads, and the ``Tree`` that they lie in.

    ``options``: what each scheme's driver is built with.
    """

    def __init__(self, options: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._options = options or {}
        self._systems: dict[str, Any] = {}
        self._lock = threading.RLock()

    def stat(self, artifact: Artifact) -> ObjectInfo:
        """Return size and version."""
        system, path = self._place(artifact.url)
        return _look(system, path, artifact.url)

    def open_first(self, artifact: Artifact, end: int) -> FsspecStream:
        """Return the bytes ``[0, end)`` of the version there is now."""
        info = self.stat(artifact)
        return self.open_range(artifact, 0, min(end, info.size_bytes), info)

    def send_first(self, artifact: Artifact, end: int) -> PendingResponse:
        """Return what opens the bytes ``[0, end)`` of the version there is then."""
        return PendingResponse(partial(self.open_first, artifact, end))

    def open_range(
        self, artifact: Artifact, start: int, end: int, version: ObjectInfo
    ) -> FsspecStream:
        """Return the bytes ``[start, end)`` of *version*."""
        system, path = self._place(artifact.url)
        return FsspecStream(system, path, artifact.url, start, end, version)

    def listed_size(self, artifact: Artifact) -> None:
        """Return None: whoever lists its folders can list them again."""

    def close(self) -> None:
        """Do nothing: drivers keep their sessions."""

    def tree(self, url: str) -> FsspecTree:
        """Return the folders of the place that *url* is in.

        Raises:
            ConfigError: no driver for it, its package is not installed, it refuses the options,
                or there is another place of that scheme already.
        """
        scheme = url.partition("://")[0]
        system = _drive(url, scheme, self._options.get(scheme, {}))
        with self._lock:
            if self._systems.setdefault(scheme, system) is not system:
                raise ConfigError(
                    f"two servers behind {scheme}://",
                    where=url,
                    expected="one, because files are told apart by their paths",
                    next_step="fetch from one after the other",
                )
        return FsspecTree(system, scheme)

    def _place(self, url: str) -> tuple[Any, str]:
        scheme = url.partition("://")[0]
        with self._lock:  # to each thread, fsspec gives a driver of its own
            if scheme not in self._systems:
                self.tree(url)
            system = self._systems[scheme]
        return system, system._strip_protocol(url)


class FsspecTree:
    """The folders of a file system; paths are without its scheme."""

    def __init__(self, system: Any, scheme: str) -> None:
        self._system = system
        self._scheme = scheme

    def path(self, url: str) -> str:
        """Return what the driver calls the place at *url*."""
        return str(self._system._strip_protocol(url)).rstrip("/")

    def folders(self, path: str) -> Sequence[str]:
        """Return the names of the folders directly in *path*."""
        try:
            entries = self._system.ls(path or self._system.root_marker, detail=True)
        except FileNotFoundError:
            return []
        except Exception as error:
            raise _translate(error, self.url(path)) from None
        names = (e["name"] for e in entries if e["type"] == "directory")
        return [name.rstrip("/").rpartition("/")[2] for name in names]

    def files(self, path: str) -> Iterator[StoredFile]:
        """Yield every file below *path*."""
        try:
            found = self._system.find(path or self._system.root_marker, detail=True)
        except Exception as error:
            raise _translate(error, self.url(path)) from None
        for name, info in found.items():
            yield StoredFile(name[len(path) :].lstrip("/"), info.get("size"))

    def url(self, path: str) -> str:
        """Return the URL of *path*."""
        return f"{self._scheme}://{path}"


class FsspecStream:
    """The bytes of one range; see ``ByteStream``. At most 4 MiB are held at a time."""

    def __init__(
        self, system: Any, path: str, url: str, start: int, end: int, version: ObjectInfo
    ) -> None:
        self._system = system
        self._path = path
        self._url = url
        self._start = start
        self._end = min(end, version.size_bytes)
        self._chunk = memoryview(b"")
        self.info = version

    def readinto(self, buffer: memoryview, /) -> int:
        """Put the next bytes into *buffer* and return their count, 0 at the range's end."""
        if not self._chunk and self._start < self._end:
            self._chunk = self._read()
        count = min(len(buffer), len(self._chunk))
        buffer[:count] = self._chunk[:count]
        self._chunk = self._chunk[count:]
        return count

    def abort(self) -> None:
        """Do nothing: a driver's requests are its own."""

    def close(self) -> None:
        """Let go of what was read."""
        self._chunk = memoryview(b"")

    def _read(self) -> memoryview:
        end = min(self._start + _CHUNK_BYTES, self._end)
        try:
            data = self._system.cat_file(self._path, self._start, end)
        except Exception as error:
            raise _translate(error, self._url) from None
        short = len(data) != end - self._start
        if short or end == self._end:
            self._check_version()
        if short:
            raise TransientError(
                "fewer bytes came than were asked for",
                where=self._url,
                expected=f"{end - self._start} bytes",
                got=f"{len(data)} bytes",
            )
        self._start = end
        return memoryview(data)

    def _check_version(self) -> None:
        found = _look(self._system, self._path, self._url)
        if (found.size_bytes, found.version) != (self.info.size_bytes, self.info.version):
            raise ChangedError(
                "the object changed while it was being read",
                where=self._url,
                expected=f"{self.info.size_bytes} bytes, version {self.info.version}",
                got=f"{found.size_bytes} bytes, version {found.version}",
                next_step="run again once nothing writes to it any more",
            )


def _look(system: Any, path: str, url: str) -> ObjectInfo:
    """Return size and version as they are now, not as an earlier listing had them."""
    try:
        system.invalidate_cache(system._parent(path))
        info = system.info(path)
    except Exception as error:
        raise _translate(error, url) from None
    is_file = info.get("type") not in ("directory", "other")  # such as a FIFO, of 0 bytes
    if not is_file or not isinstance(info.get("size"), int):
        raise FetchError("not a file, or one whose size is not told", where=url)
    # ``created`` is the time of the last write where nothing is ever changed in place.
    names = (*_VERSIONS, "created")
    version = next((f"{name}={info[name]}" for name in names if info.get(name) is not None), None)
    if version and info.get("ino"):
        version += f" ino={info['ino']}"
    return ObjectInfo(info["size"], version, True, _checksums(info))


def _checksums(info: Mapping[str, Any]) -> tuple[Checksum, ...]:
    """Google Cloud Storage's and Azure's sums, as gcsfs and adlfs hand them on."""
    found: list[Checksum] = []
    azure = info.get("content_settings")
    md5 = info.get("md5Hash") or (azure.get("content_md5") if isinstance(azure, Mapping) else None)
    for algorithm, size_bytes, value in (("crc32c", 4, info.get("crc32c")), ("md5", 16, md5)):
        try:
            digest = base64.b64decode(value) if isinstance(value, str) else bytes(value or b"")
        except (ValueError, TypeError):
            continue
        if len(digest) == size_bytes:
            found.append(Checksum("crc32c" if algorithm == "crc32c" else "md5", digest))
    return tuple(found)


def _drive(url: str, scheme: str, options: Mapping[str, Any]) -> Any:
    """Return fsspec's driver for *url*; what the URL says of its server, *options* may overrule."""
    import fsspec
    from fsspec.registry import known_implementations

    try:
        driver = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        name = str(known_implementations.get(scheme, {}).get("class", "")).partition(".")[0]
        raise _lacks(url, scheme, error, name if name != "fsspec" else "") from None
    except ValueError:
        raise ConfigError(
            f"{scheme}:// is nothing that podloader or fsspec knows",
            where=url,
            expected="a listing JSON, s3://, baseten, or a scheme of fsspec such as gs:// or az://",
            next_step="correct artifacts or base_model",
        ) from None
    try:
        return driver(**{**driver._get_kwargs_from_urls(url), **options})
    except ImportError as error:
        raise _lacks(url, scheme, error) from None
    except Exception as error:
        raise ConfigError(
            f"the driver of {scheme}:// does not start",
            where=f"storage_options.{scheme}",
            got=type(error).__name__,
            next_step="correct the options, or the credentials that the driver looks for",
        ) from None


def _lacks(url: str, scheme: str, error: ImportError, package: str = "") -> ConfigError:
    """Return the error for a driver without its *package*; fsspec wraps what Python says of it."""
    package = package or error.name or getattr(error.__cause__, "name", None) or ""
    package = package.partition(".")[0]  # what pip knows, of "pyarrow.fs"
    return ConfigError(
        f"{scheme}:// needs a package that is not installed",
        where=url,
        expected=package or str(error),
        next_step=f"pip install {package}" if package else "install what it needs",
    )


def _translate(error: Exception, url: str) -> Exception:
    """Return our error for a driver's; its text stays out, it may show credentials."""
    status = next(
        (
            value
            for name in ("status", "status_code", "code")
            if isinstance(value := getattr(error, name, None), int)
        ),
        0,
    )
    got = type(error).__name__ + (f", HTTP {status}" if status else "")
    if isinstance(error, LoaderError):
        return error
    if isinstance(error, FileNotFoundError | NotADirectoryError) or status in (404, 410):
        return FetchError("there is nothing", where=url, got=got, next_step="correct the URL")
    if isinstance(error, IsADirectoryError):
        return FetchError("a folder, where a file is needed", where=url, got=got)
    if isinstance(error, PermissionError) or status in (401, 403):
        return DeniedError(
            "access is refused",
            where=url,
            got=got,
            next_step="check storage_options, or the credentials that the driver finds by itself",
        )
    passing = status in (408, 429) or status >= 500
    ours = TypeError | ValueError | LookupError | AttributeError | ArithmeticError
    lasting = isinstance(error, OSError) and error.errno in _LASTING
    if not passing and (400 <= status < 500 or isinstance(error, ours) or lasting):
        return FetchError("the driver fails", where=url, got=got)
    return TransientError("the place did not answer", where=url, got=got)
