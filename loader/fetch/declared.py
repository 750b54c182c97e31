"""What is declared of an artifact's bytes, by its origin or by a manifest of sums beside it."""

from __future__ import annotations

from pathlib import Path

from loader.fetch.digests import Digests
from loader.fetch.files import STATE, Places, Record
from loader.fetch.missing_ranges import digest_text
from loader.fetch.progress import Working
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
        return f"{info.size_bytes} bytes of version {info.version}, {artifact.source}"
    return None


def declared_digest(info: ObjectInfo) -> str | None:
    """Return what the origin says that the bytes sum up to; no version tells of other objects."""
    sums = (f"{s.algorithm} {s.parts} {s.part_bytes} {s.digest.hex()}" for s in info.checksums)
    return next(sums, None)


def is_as_declared(artifact: Artifact, place: Places, record: Record, working: Working) -> bool:
    """Return whether a whole file, which is what *record* says, has the sums of its manifest.

    Raises:
        LoaderError: it cannot be read.
    """
    for checksum in artifact.checksums:
        if checksum.algorithm == "crc64nvme":  # of which every file has one
            return record.digest == digest_text(int.from_bytes(checksum.digest, "big"))
    digests = Digests(Path(place.folders.root, STATE, "digests"), working)
    return all(digests.of(place.final, c.algorithm) == c.digest for c in artifact.checksums)
