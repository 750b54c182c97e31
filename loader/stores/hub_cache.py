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


def declared_sha256(path: Path) -> str | None:
    """Return the SHA-256 that the Hub declares of a file in the cache, None where it has none."""
    name = path.resolve().name
    return name if _SHA256.fullmatch(name) else None


def drop_rotten(files: Iterable[Path]) -> list[Path]:
    """Remove, and return, those *files* of the cache that are not what the Hub declares."""
    links = [path for path in files if path.is_file()]
    sound = map_on_threads(_is_sound, links, _THREADS)
    rotten = [path for path, is_sound in zip(links, sound, strict=True) if not is_sound]
    for path in rotten:
        _log.warning("%s is not what the Hub declares; it is fetched again", path.name)
        path.resolve().unlink()
        path.unlink(missing_ok=True)
    return rotten


def _is_sound(path: Path) -> bool:
    declared = declared_sha256(path)
    if declared is None:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == declared
