"""What an answer's headers say about the object's bytes: sums that are declared, and ETags that
look like an MD5.

Sources: Amazon S3 user guide, "Checking object integrity" and "Common response headers"; Google
Cloud Storage, ``x-goog-hash``; Azure Blob Storage, ``x-ms-blob-content-md5``; RFC 9530,
``Repr-Digest`` and ``Content-Digest``; RFC 3230, ``Digest``; RFC 1864, ``Content-MD5``.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from loader.http.objects import Algorithm, Checksum

_ETAG = re.compile(r'"?(?P<md5>[0-9a-f]{32})(?:-(?P<parts>[1-9]\d{0,4}))?"?')
_AMZ = "x-amz-checksum-"
_PARTS = re.compile(r'"?.+-(?P<parts>[1-9]\d{0,4})"?')  # of an ETag, whatever is before them
_COUNT = re.compile(r"[1-9]\d{0,4}")
_TELLING = (  # beside the ETag
    "x-amz-",
    "x-goog-",
    "x-ms-blob-content-md5",
    "repr-digest",
    "digest",
    "content-digest",
    "content-md5",
)
_FROM_START = re.compile(r"bytes 0-(?P<last>[0-9]{1,19})/(?P<total>[0-9]{1,19})")
_OF_PARTS = ("sha256", "sha1")  # of an upload in parts, S3 has no such sum of the whole
_HASHES = {"sha": "sha1"}  # as RFC 3230 calls it
_SIZES: Mapping[Algorithm, int] = {
    "crc64nvme": 8,
    "crc32c": 4,
    "crc32": 4,
    "sha256": 32,
    "sha1": 20,
    "md5": 16,
}


def read_checksums(headers: Collection[tuple[str, str]]) -> tuple[Checksum, ...]:
    """Return what *headers* say of the whole object, whichever range of it they came with."""
    for name, _ in headers:
        if name.lower().startswith(_TELLING):
            break
    else:
        return ()
    fields = {name.lower(): value.strip() for name, value in headers}
    found = [_amz(fields, algorithm) for algorithm in _SIZES]
    # Decompressed on the way out: the sums are of the bytes as they are stored.
    if fields.get("x-goog-stored-content-encoding", "identity") == "identity":
        found += _listed(fields, "x-goog-hash")
    found.append(_plain("md5", fields.get("x-ms-blob-content-md5", "")))
    found += _listed(fields, "repr-digest") + _listed(fields, "digest")
    held = _FROM_START.fullmatch(fields.get("content-range", "").lower())
    # Of a range, these are of its bytes alone, or of the object's, who knows; all of it is both.
    if "content-range" not in fields or (held and int(held["last"]) + 1 == int(held["total"])):
        found += _listed(fields, "content-digest")
        found.append(_plain("md5", fields.get("content-md5", "")))
    found.append(_etag(fields))  # what is declared goes before what is guessed
    return tuple(dict.fromkeys(checksum for checksum in found if checksum is not None))


def etag_checksum(etag: str) -> Checksum | None:
    """Return the MD5 that S3 puts into the ETag of an object that no key of its own encrypts.

    ``"<md5>"``, or ``"<md5 of the parts' md5s>-<parts>"`` after a multipart upload. It is a guess:
    services that speak S3's language put other things of that form there.
    """
    match = _ETAG.fullmatch(etag)
    if match is None:
        return None
    digest, parts = bytes.fromhex(match["md5"]), int(match["parts"] or 0)
    return Checksum("md5", digest, parts, guessed=True)


def _etag(fields: Mapping[str, str]) -> Checksum | None:
    """Other servers' ETags may look the same and be something else."""
    speaks_s3 = any(name.startswith("x-amz-") for name in fields)
    encrypted = fields.get("x-amz-server-side-encryption", "AES256") != "AES256" or (
        "x-amz-server-side-encryption-customer-algorithm" in fields
    )
    express = fields.get("x-amz-storage-class") == "EXPRESS_ONEZONE"
    if not speaks_s3 or encrypted or express:
        return None
    return etag_checksum(fields.get("etag", ""))


def _amz(fields: Mapping[str, str], algorithm: Algorithm) -> Checksum | None:
    """``<base64>``, with ``-<parts>`` behind it where it is a checksum of the parts' checksums.

    Services leave those out at times. It is of the whole where the type says so, where the
    algorithm allows nothing else, or where nothing speaks of parts.
    """
    text, _, suffix = fields.get(_AMZ + algorithm, "").partition("-")
    checksum = _plain(algorithm, text)
    if checksum is None:
        return None
    tag = _PARTS.fullmatch(fields.get("etag", ""))
    told = fields.get("x-amz-mp-parts-count", "") or (tag["parts"] if tag else "")
    kind = fields.get(_AMZ + "type", "").upper()
    if kind == "FULL_OBJECT" or algorithm == "crc64nvme":
        return checksum if not suffix else None
    is_composite = suffix or kind == "COMPOSITE" or algorithm in _OF_PARTS
    if not suffix and not told:
        return checksum if kind != "COMPOSITE" else None
    parts = suffix or told
    return replace(checksum, parts=int(parts)) if is_composite and _COUNT.fullmatch(parts) else None


def _listed(fields: Mapping[str, str], name: str) -> list[Checksum | None]:
    """``<algorithm>=<base64>, …``, the base64 between colons where the RFC wants them."""
    found: list[Checksum | None] = []
    for entry in fields[name].split(",") if name in fields else ():
        algorithm, _, value = entry.strip().partition("=")
        algorithm = algorithm.lower().replace("-", "")
        found.append(_plain(_HASHES.get(algorithm, algorithm), value.strip(":")))
    return found


def _plain(name: str, value: str) -> Checksum | None:
    if not value:
        return None
    for algorithm, size_bytes in _SIZES.items():
        if algorithm == name:
            try:
                digest = base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                return None
            return Checksum(algorithm, digest) if len(digest) == size_bytes else None
    return None
