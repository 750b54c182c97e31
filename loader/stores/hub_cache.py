"""Proofs that what huggingface-hub's cache holds has not rotted.

Source: huggingface-hub's guide, "Understand caching": a model's files are links to blobs that bear
the name of their ETag. For weights (LFS, Xet) that is the SHA-256 of the bytes.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from loader.threads import map_on_threads

_SHA256 = re.compile(r"[0-9a-f]{64}")
_THREADS = 4
_log = logging.getLogger("podloader")


def drop_rotten(files: Iterable[Path], before_ns: int) -> None:
    """Remove those *files* of the cache, where they are there, that are not what the Hub gave.

    Only what was written *before_ns* (epoch nanoseconds) is read, not what this run downloaded.
    """
    links = [path for path in files if path.is_file()]
    sound = map_on_threads(lambda path: _is_sound(path, before_ns), links, _THREADS)
    for path, is_sound in zip(links, sound, strict=True):
        if not is_sound:
            _log.warning("%s is not what the Hub gave; it is fetched again", path.name)
            path.resolve().unlink()
            path.unlink(missing_ok=True)


def _is_sound(path: Path, before_ns: int) -> bool:
    blob = path.resolve()
    if not _SHA256.fullmatch(blob.name) or blob.stat().st_mtime_ns >= before_ns:
        return True
    with blob.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == blob.name
