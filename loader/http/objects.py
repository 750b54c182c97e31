"""What an origin says of an object: its size, its version, what its bytes sum up to."""

from __future__ import annotations

from dataclasses import dataclass

from loader.types import Algorithm, Checksum

__all__ = ["Algorithm", "Checksum", "ObjectInfo", "is_same_version"]

_STRONG = ('"', "etag=", "ETag=", "generation=")  # the latter as fsspec's drivers call them


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

    @property
    def is_pinned(self) -> bool:
        """Whether its version stands for its bytes: a strong ETag (RFC 9110, 8.8.3), no date."""
        return self.version is not None and self.version.startswith(_STRONG)


def is_same_version(one: str, other: str) -> bool:
    """Return whether two versions are one; an ETag may be told as a weak one at times.

    By RFC 9110, 8.8.3.2, weak comparison.
    """
    return one.removeprefix("W/") == other.removeprefix("W/")
