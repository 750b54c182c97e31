"""Files at the origin, read by ranges."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loader.arriving.delivery import Delivery
from loader.errors import ChangedError, FormatError
from loader.fetch.snapshot import FetchOptions
from loader.stores.presigned import PresignedStore
from loader.timeline import Timeline
from loader.types import Artifact, Manifest
from loader.weights.byte_files import ByteFile
from tests.origin import FaultyOrigin, cut, write_listing

CONTENT = bytes(range(256)) * 12_000  # about 3 MB


@pytest.fixture
def remote(origin: FaultyOrigin, store: PresignedStore, tmp_path: Path) -> ByteFile:
    origin.put("big", CONTENT)
    path = write_listing(origin, tmp_path / "job1.json")
    (entry,) = json.loads(path.read_text())["checkpoint_artifacts"]
    artifact = Artifact("job1", 0, "big", entry["url"])
    return remote_file(artifact, store, retries=3)


def remote_file(artifact: Artifact, store: PresignedStore, retries: int) -> ByteFile:
    """Return a file that stays at the origin, its version being asked for now."""
    options = FetchOptions(retries=retries)
    delivery = Delivery(Manifest((artifact,)), Path("/none"), store, options, Timeline(quiet=True))
    return delivery.file(artifact.path)


def read(file: ByteFile, start: int, count: int) -> bytes:
    buffer = bytearray(count)
    file.read_into(start, memoryview(buffer))
    return bytes(buffer)


def test_small_reads_share_a_block_and_large_ones_are_exact(
    remote: ByteFile, origin: FaultyOrigin
) -> None:
    before = len(origin.requests)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: read(remote, 1000 + i, 100), range(64)))
    assert got == [CONTENT[1000 + i : 1100 + i] for i in range(64)]
    assert origin.ranges_of("big")[before:] == ["bytes=0-262143"]
    assert read(remote, 262_100, 100) == CONTENT[262_100:262_200]
    assert read(remote, 5, 1_000_000) == CONTENT[5:1_000_005]
    assert origin.ranges_of("big")[-1] == "bytes=5-1000004"
    assert read(remote, len(CONTENT) - 3, 3) == CONTENT[-3:]


def test_a_read_behind_the_end(remote: ByteFile) -> None:
    with pytest.raises(FormatError, match="ends too early"):
        read(remote, len(CONTENT) - 3, 4)


def test_a_broken_connection_goes_on_where_it_was(remote: ByteFile, origin: FaultyOrigin) -> None:
    origin.fail("big", cut(300_000), cut(100_000))
    assert read(remote, 0, 1_000_000) == CONTENT[:1_000_000]


def test_another_version_is_refused(remote: ByteFile, origin: FaultyOrigin) -> None:
    origin.put("big", CONTENT[::-1])
    with pytest.raises(ChangedError):
        read(remote, 0, 10)
