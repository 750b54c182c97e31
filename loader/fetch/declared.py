"""What is declared of an artifact's bytes, by its origin or by a manifest of sums beside it."""

from __future__ import annotations

from loader.http.objects import Checksum, ObjectInfo
from loader.types import Artifact


def declared_checksums(artifact: Artifact, info: ObjectInfo | None = None) -> tuple[Checksum, ...]:
    """Return the declared sums of the whole file, those of a manifest first; what differs is wrong.

    *info* is what the origin says of the object. What is only guessed from an ETag is none of them,
    nor are sums of the parts that an object was uploaded in.
    """
    told = info.checksums if info is not None else ()
    found = (*artifact.checksums, *told)
    return tuple(sum_ for sum_ in found if not sum_.guessed and not sum_.parts)


def identify(artifact: Artifact, info: ObjectInfo) -> str | None:
    """Return what tells the object's bytes from any others before they are here.

    A declared sum; else the place, the size and a version that ``If-Match`` pins. None where the
    origin gives nothing of the sort: then the digest of the bytes has to tell.
    """
    for checksum in declared_checksums(artifact, info):
        return f"{info.size_bytes} bytes, {checksum.algorithm} {checksum.digest.hex()}"
    if info.is_pinned:
        return f"{info.size_bytes} bytes, version {info.version} of {artifact.source}"
    return None
