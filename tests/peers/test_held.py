"""Chunks of files that lie on the disk."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest

from loader.fetch.crc import crc64nvme
from loader.fetch.files import Record, places, write_journal, write_record
from loader.fetch.missing_ranges import DoneRange
from loader.peers.chunks import CHUNK_BYTES, SharedObject
from loader.peers.held import find_held
from loader.types import Artifact

_CONTENT = os.urandom(2 * CHUNK_BYTES + 10)
_OBJECT = SharedObject("job/rank-0/w", len(_CONTENT), '"tag"')
_ARTIFACT = Artifact("job", 0, "w", "https://x/w", len(_CONTENT))


def _ranges(*bounds: int) -> tuple[DoneRange, ...]:
    return tuple(DoneRange(a, b, crc64nvme(_CONTENT[a:b])) for a, b in pairwise(bounds))


def _lay(root: Path, ranges: tuple[DoneRange, ...], **fields: object) -> Path:
    place = places(root, _ARTIFACT)
    place.final.parent.mkdir(parents=True)
    place.final.write_bytes(_CONTENT)
    stat = place.final.stat()
    record = {
        "size_bytes": len(_CONTENT),
        "digest": "",
        "source": "",
        "version": '"tag"',
        "mtime_ns": stat.st_mtime_ns,
        "boot_id": "",
        "ranges": ranges,
    }
    write_record(place, Record(**{**record, **fields}))  # type: ignore[arg-type]
    return place.final


def _held(root: Path, number: int) -> int | None:
    found = find_held(root, _OBJECT.chunk(number))
    if found is None:
        return None
    os.close(found.fd)
    return found.crc


@pytest.mark.parametrize("middle", [CHUNK_BYTES, CHUNK_BYTES // 2, CHUNK_BYTES + 77])
def test_chunks_of_a_whole_file_are_held_however_it_came(tmp_path: Path, middle: int) -> None:
    _lay(tmp_path, _ranges(0, middle, 2 * CHUNK_BYTES, len(_CONTENT)))
    for number in range(3):
        chunk = _OBJECT.chunk(number)
        assert _held(tmp_path, number) == crc64nvme(_CONTENT[chunk.start : chunk.end])


@pytest.mark.parametrize("middle", [CHUNK_BYTES, CHUNK_BYTES // 2])
def test_bytes_that_rotted_are_not_proved_by_themselves(tmp_path: Path, middle: int) -> None:
    path = _lay(tmp_path, _ranges(0, middle, 2 * CHUNK_BYTES, len(_CONTENT)))
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(CHUNK_BYTES + 5)
        file.write(bytes([_CONTENT[CHUNK_BYTES + 5] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    right = crc64nvme(_CONTENT[CHUNK_BYTES : 2 * CHUNK_BYTES])
    assert _held(tmp_path, 1) in (None, right)


@pytest.mark.parametrize("fields", [{"version": '"other"'}, {"size_bytes": 5}, {"mtime_ns": 1}])
def test_another_version_or_a_file_that_was_written_to_is_not_held(
    tmp_path: Path, fields: dict[str, object]
) -> None:
    _lay(tmp_path, _ranges(0, len(_CONTENT)), **fields)
    assert _held(tmp_path, 0) is None


def test_of_a_part_the_chunks_are_held_that_its_journal_has(tmp_path: Path) -> None:
    place = places(tmp_path, _ARTIFACT)
    part = Path(place.part)
    part.parent.mkdir(parents=True)
    part.write_bytes(_CONTENT)
    key = {"size_bytes": len(_CONTENT), "version": '"tag"'}
    os.close(write_journal(place, key, _ranges(0, CHUNK_BYTES)))
    assert _held(tmp_path, 0) == crc64nvme(_CONTENT[:CHUNK_BYTES])
    assert _held(tmp_path, 1) is None


def test_nothing_there_is_nothing_held(tmp_path: Path) -> None:
    assert _held(tmp_path, 0) is None
