"""What an origin says of an object: its size, its version, what its bytes sum up to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Algorithm = Literal["crc64nvme", "crc32c", "crc32", "sha256", "sha1", "md5"]


@dataclass(frozen=True, slots=True)
class Checksum:
    """What the origin says that the object's bytes sum up to, as big-endian bytes.

    ``parts`` is 0 where ``digest`` is of the bytes themselves. Else the object was uploaded in so
    many parts and ``digest`` is of the parts' digests, one behind the other; ``part_bytes`` is the
    size of every part but the last, where the origin tells it.
    """

    algorithm: Algorithm
    digest: bytes
    parts: int = 0
    part_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """The version of an object. ``version`` is an ETag or a Last-Modified date, if any.

    ``ranges`` is False where the origin sends the whole object whatever range is asked for.
    ``checksums`` are of the whole object; an answer to a range may have fewer than ``stat``'s.
    """

    size_bytes: int
    version: str | None = None
    ranges: bool = True
    checksums: tuple[Checksum, ...] = ()


def is_same_version(one: str, other: str) -> bool:
    """Return whether two versions are one; an ETag may be told as a weak one at times.

    By RFC 9110, 8.8.3.2, weak comparison.
    """
    return one.removeprefix("W/") == other.removeprefix("W/")
