"""What ETags that look like an MD5 mean at each origin: learned, not believed.

S3 puts an MD5 there, other services that speak its language a number of their own in that form. The
first ETag that does not fit its file is tried by reading the object once more: the same bytes again
mean that such ETags are no sums there. Where one has fitted before, they are, and a file that does
not fit is damaged; so are those, then, that were taken before the first one fitted.
"""

from __future__ import annotations

import logging
import threading
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import urlsplit

from loader.errors import FetchError, LoaderError
from loader.fetch.crc import crc64nvme
from loader.fetch.files import WHOLE, Places
from loader.fetch.missing_ranges import digest_text
from loader.fetch.stopping import check_stop
from loader.http.objects import Checksum, ObjectInfo
from loader.retry import ask_again
from loader.stores.base import Store
from loader.types import Artifact

_CHUNK_BYTES = 1 << 20
_log = logging.getLogger("podloader")


@dataclass(slots=True)
class _Origin:
    """What is known of one origin's ETags of one form."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    fits: bool = False
    is_none: bool = False
    doubted: list[tuple[Artifact, Places]] = field(default_factory=list)


class Guesses:
    """The ETags of one fetch. Every method may be called from any thread."""

    def __init__(self, store: Store, retries: int, stop: threading.Event) -> None:
        self._store = store
        self._retries = retries
        self._stop = stop
        self._lock = threading.Lock()
        self._origins: dict[tuple[str, int], _Origin] = {}

    def note_fit(self, artifact: Artifact, checksum: Checksum) -> None:
        """Note that a guessed sum was right.

        Raises:
            FetchError: files of that origin were taken whose sum was not. They are removed.
        """
        origin = self._find(artifact, checksum)
        if origin.fits:
            return
        with origin.lock:
            origin.fits = True
            doubted, origin.doubted = origin.doubted, []
        for _, place in doubted:
            with suppress(OSError):
                place.remove("record", WHOLE)
        if doubted:
            raise FetchError(
                "the bytes of files do not sum up to their ETags, as those of others there do",
                where=_origin_of(artifact),
                problems=[one.path for one, _ in doubted],
                next_step="run again: they are fetched anew; a second time means that the "
                "origin's copies are damaged",
            )

    def is_refuted(
        self, artifact: Artifact, place: Places, info: ObjectInfo, checksum: Checksum, digest: str
    ) -> bool:
        """Return whether the ETag is no sum at all, so that a file of *digest* may be taken."""
        origin = self._find(artifact, checksum)
        with origin.lock:
            if origin.fits:
                return False
            if not origin.is_none:
                try:
                    again = ask_again(partial(self._read, artifact, info), self._retries)
                except LoaderError as error:
                    _log.warning("%s cannot be read again: %s", artifact.path, error.what)
                    return False
                if again != digest:
                    return False
                origin.is_none = True
                _log.warning(
                    "ETags of %s look like an MD5 and are none: %s came twice with the same bytes, "
                    "which do not sum up to its own. They prove nothing there",
                    _origin_of(artifact),
                    artifact.path,
                )
            origin.doubted.append((artifact, place))
            return True

    def _find(self, artifact: Artifact, checksum: Checksum) -> _Origin:
        # Services that put another number there often do so for uploads in parts alone, or say
        # that it is no sum by a count of one.
        key = _origin_of(artifact), min(checksum.parts, 2)
        with self._lock:
            return self._origins.setdefault(key, _Origin())

    def _read(self, artifact: Artifact, info: ObjectInfo) -> str:
        """Return the digest of the object's bytes, which are read once more and kept nowhere."""
        crc, buffer = 0, memoryview(bytearray(_CHUNK_BYTES))
        if info.size_bytes:
            with closing(self._store.open_range(artifact, 0, info.size_bytes, info)) as stream:
                while count := stream.readinto(buffer):
                    check_stop(self._stop)
                    crc = crc64nvme(buffer[:count], crc)
        return digest_text(crc)


def _origin_of(artifact: Artifact) -> str:
    parts = urlsplit(artifact.source)
    return f"{parts.scheme}://{parts.netloc}"
