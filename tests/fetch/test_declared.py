"""What is declared of a file, and what tells an object from any other."""

from __future__ import annotations

import pytest

from loader.fetch.declared import declared_checksums, identify
from loader.http.objects import ObjectInfo
from loader.types import Artifact, Checksum

SHA = Checksum("sha256", bytes(32))
CRC = Checksum("crc64nvme", bytes(8))
GUESS = Checksum("md5", bytes(16), guessed=True)
PARTS = Checksum("sha256", bytes(32), 3)
PLAIN = Artifact("job1", 0, "a", "https://h/a?Signature=x")
LISTED = Artifact("job1", 0, "a", "https://h/a", checksums=(SHA,))


def test_the_manifest_goes_first_and_guesses_are_none() -> None:
    info = ObjectInfo(5, checksums=(GUESS, PARTS, CRC))
    assert declared_checksums(PLAIN) == ()
    assert declared_checksums(PLAIN, info) == (CRC,)
    assert declared_checksums(LISTED, info) == (SHA, CRC)


@pytest.mark.parametrize(
    ("version", "is_known"),
    [
        ('"abc"', True),
        ('W/"abc"', False),
        ("Sun, 29 Nov 2026 10:49:59 GMT", False),
        (None, False),
        ("etag=abc", True),
        ("generation=7", True),
        ("mtime=1.5 ino=7", False),
    ],
)
def test_what_tells_an_object(version: str | None, is_known: bool) -> None:
    found = identify(PLAIN, ObjectInfo(5, version))
    assert (found is not None) == is_known
    assert "Signature" not in (found or "")
    elsewhere = Artifact("job1", 0, "a", "https://other/a")
    assert identify(elsewhere, ObjectInfo(5, version)) != found or not is_known
    assert identify(PLAIN, ObjectInfo(6, version)) != found or not is_known
    declared = identify(LISTED, ObjectInfo(5, version))
    assert declared == identify(elsewhere, ObjectInfo(5, None, checksums=(SHA,)))
