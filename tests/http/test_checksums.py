"""What origins say of their objects, in the words of each."""

from __future__ import annotations

import base64

import pytest

from loader.http.checksums import etag_checksum, read_checksums
from loader.http.objects import Checksum

MD5 = "9e107d9d372bb6826bd81d3542a419d6"
D4 = bytes(range(4))
CRC32 = base64.b64encode(bytes(range(4))).decode()
TYPE = "x-amz-checksum-type"
CRC = base64.b64encode(bytes(range(8))).decode()
SHA = base64.b64encode(bytes(range(32))).decode()
S3 = ("x-amz-request-id", "1")
MD5_SUM = Checksum("md5", bytes.fromhex(MD5))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([S3, ("ETag", f'"{MD5}"')], Checksum("md5", bytes.fromhex(MD5))),
        ([S3, ("ETag", f'"{MD5}-12"')], Checksum("md5", bytes.fromhex(MD5), parts=12)),
        (
            [S3, ("ETag", f'"{MD5}"'), ("x-amz-server-side-encryption", "AES256")],
            Checksum("md5", bytes.fromhex(MD5)),
        ),
        ([("X-Amz-Checksum-CRC64NVME", CRC)], Checksum("crc64nvme", bytes(range(8)))),
        ([("x-amz-checksum-sha256", f"{SHA}-3")], Checksum("sha256", bytes(range(32)), parts=3)),
        ([("x-goog-hash", "crc32c=AAECAw==,md5=x")], Checksum("crc32c", bytes(range(4)))),
        (
            [("x-ms-blob-content-md5", base64.b64encode(bytes.fromhex(MD5)).decode())],
            Checksum("md5", bytes.fromhex(MD5)),
        ),
        ([("Repr-Digest", f"sha-256=:{SHA}:")], Checksum("sha256", bytes(range(32)))),
        ([("Content-Digest", f"sha-256=:{SHA}:")], Checksum("sha256", bytes(range(32)))),
        ([("Digest", f"UNIXsum=7,SHA-256={SHA}")], Checksum("sha256", bytes(range(32)))),
        (
            [("Content-MD5", base64.b64encode(bytes.fromhex(MD5)).decode())],
            Checksum("md5", bytes.fromhex(MD5)),
        ),
        *[
            ([("Content-MD5", base64.b64encode(bytes.fromhex(MD5)).decode()), whole], MD5_SUM)
            for whole in [("Content-Range", "bytes 0-8/9"), ("Content-Range", "Bytes 0-0/1")]
        ],
        # With an ETag that is no MD5 but speaks of parts.
        *[
            ([("x-amz-checksum-crc32", CRC32 + suffix), *more], Checksum("crc32", D4, parts))
            for suffix, more, parts in [
                ("", [], 0),
                ("", [(TYPE, "FULL_OBJECT"), ("ETag", '"abc-12"')], 0),
                ("", [(TYPE, "COMPOSITE"), ("ETag", '"abc-12"')], 12),
                ("", [(TYPE, "COMPOSITE"), ("x-amz-mp-parts-count", "3")], 3),
                ("-12", [(TYPE, "COMPOSITE"), ("ETag", '"abc-12"')], 12),
                ("-12", [("ETag", '"abc"')], 12),
            ]
        ],
        (
            [("x-amz-checksum-sha256", SHA), ("ETag", '"abc-12"')],  # it can be nothing else
            Checksum("sha256", bytes(range(32)), 12),
        ),
        (
            [("x-amz-checksum-crc64nvme", CRC), ("ETag", '"abc-12"')],
            Checksum("crc64nvme", bytes(range(8))),
        ),
    ],
)
def test_what_is_said(headers: list[tuple[str, str]], expected: Checksum) -> None:
    assert read_checksums(headers) == (expected,)


@pytest.mark.parametrize(
    "headers",
    [
        [("ETag", f'"{MD5}"')],  # another server's tag that looks alike
        [S3, ("ETag", f'W/"{MD5}"')],
        [S3, ("ETag", f'"{MD5}"'), ("x-amz-server-side-encryption", "aws:kms")],
        [S3, ("ETag", f'"{MD5}"'), ("x-amz-server-side-encryption-customer-algorithm", "AES256")],
        [S3, ("ETag", f'"{MD5}"'), ("x-amz-storage-class", "EXPRESS_ONEZONE")],
        [("x-amz-checksum-crc32c", "AAEC")],
        [("x-amz-checksum-crc32c", "not base64")],
        [("x-amz-checksum-crc32c", "AAECAw==-x")],
        [("x-amz-checksum-crc32", CRC32), ("ETag", '"abc-12"')],  # of the parts, or of the whole
        [("x-amz-checksum-crc32", CRC32), ("x-amz-mp-parts-count", "12")],
        [("x-amz-checksum-crc32", CRC32), (TYPE, "COMPOSITE")],  # of how many?
        [("x-amz-checksum-crc32", f"{CRC32}-12"), (TYPE, "FULL_OBJECT")],
        [("x-amz-checksum-crc32", f"{CRC32}-" + "9" * 5000)],
        [("Content-MD5", "AAECAw=="), ("Content-Range", "bytes 0-3/9")],
        [("Content-Digest", f"sha-256=:{SHA}:"), ("Content-Range", "bytes 0-3/9")],
        *[
            [("Content-Digest", f"sha-256=:{SHA}:"), ("Content-Range", held)]
            for held in ("bytes 1-8/9", "bytes 0-8/*", "bytes */9", "bytes 0-0/0", "9")
        ],
        [("x-goog-hash", "crc32c=AAECAw=="), ("x-goog-stored-content-encoding", "gzip")],
    ],
)
def test_what_proves_nothing(headers: list[tuple[str, str]]) -> None:
    assert read_checksums(headers) == ()


def test_all_at_once() -> None:
    headers = [S3, ("ETag", f'"{MD5}-2"'), ("x-amz-checksum-crc64nvme", CRC)]
    assert [c.algorithm for c in read_checksums(headers)] == ["crc64nvme", "md5"]
    assert etag_checksum(MD5) == Checksum("md5", bytes.fromhex(MD5))
    assert etag_checksum("0x8DABC") is None
