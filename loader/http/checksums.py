"""What an answer's headers say about the object's bytes: ETags that are an MD5, S3's checksums.

Sources: Amazon S3 user guide, "Checking object integrity" and "Common response headers"; Google
Cloud Storage, ``x-goog-hash``; Azure Blob Storage, ``x-ms-blob-content-md5``; RFC 9530,
``Repr-Digest``.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping

from loader.http.objects import Algorithm, Checksum

_ETAG = re.compile(r'"?(?P<md5>[0-9a-f]{32})(?:-(?P<parts>[1-9]\d{0,4}))?"?')
_AMZ = "x-amz-checksum-"
_TELLING = ("x-amz-", "x-goog-", "x-ms-blob-content-md5", "repr-digest")  # beside the ETag
_SIZES: Mapping[Algorithm, int] = {
    "crc64nvme": 8,
    "crc32c": 4,
    "crc32": 4,
    "sha256": 32,
    "sha1": 20,
    "md5": 16,
}


def read_checksums(headers: Iterable[tuple[str, str]]) -> tuple[Checksum, ...]:
    """Return what *headers* say of the whole object, whichever range of it they came with."""
    fields = {name.lower(): value.strip() for name, value in headers}
    if not any(name.startswith(_TELLING) for name in fields):
        return ()
    found = [_amz(algorithm, fields.get(_AMZ + algorithm, "")) for algorithm in _SIZES]
    found.append(_etag(fields))
    # Decompressed on the way out: the sums are of the bytes as they are stored.
    if fields.get("x-goog-stored-content-encoding", "identity") == "identity":
        found += [
            _plain(name, value)
            for name, _, value in map(_halves, fields.get("x-goog-hash", "").split(","))
        ]
    found.append(_plain("md5", fields.get("x-ms-blob-content-md5", "")))
    for part in fields.get("repr-digest", "").split(","):
        name, _, value = _halves(part)
        found.append(_plain(name.replace("-", ""), value.strip(":")))
    return tuple(dict.fromkeys(checksum for checksum in found if checksum is not None))


def etag_checksum(etag: str) -> Checksum | None:
    """Return the MD5 that S3 puts into the ETag of an object that no key of its own encrypts.

    ``"<md5>"``, or ``"<md5 of the parts' md5s>-<parts>"`` after a multipart upload.
    """
    match = _ETAG.fullmatch(etag)
    if match is None:
        return None
    return Checksum("md5", bytes.fromhex(match["md5"]), int(match["parts"] or 0))


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


def _amz(algorithm: Algorithm, value: str) -> Checksum | None:
    """``<base64>``, with ``-<parts>`` behind it where it is a checksum of the parts' checksums."""
    text, dash, parts = value.partition("-")
    checksum = _plain(algorithm, text)
    if checksum is None or not dash:
        return checksum
    return Checksum(algorithm, checksum.digest, int(parts)) if parts.isdecimal() else None


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


def _halves(text: str) -> tuple[str, str, str]:
    return text.strip().partition("=")
