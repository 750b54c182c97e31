"""What earlier runs left, where the world has changed since in an unlikely way."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from loader.errors import FetchError
from loader.fetch.snapshot import FetchOptions, fetch
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest, Snapshot
from tests.fetch.test_transfer import ended_after
from tests.origin import Fault, FaultyHandler, FaultyOrigin, act, answer, ignore_range, status

RANGE = 64 << 10
CONTENT = random.Random(37).randbytes(6 * RANGE + 11)
OPTIONS = FetchOptions(concurrency=1, retries=1, range_bytes=RANGE)
NOTHING = act(lambda: None)


class Place:
    """A folder that one file is fetched into, again and again."""

    def __init__(self, origin: FaultyOrigin, store: PresignedStore, root: Path) -> None:
        self.origin, self._store, self.root = origin, store, root
        self.final = root / "job1/rank-0/big.bin"
        self.state = root / ".podloader/files/job1/rank-0"

    def fetch(self) -> Snapshot:
        path = self.origin.folder() / "big.bin"
        url = self.origin.sign(path.relative_to(self.origin.root).as_posix())
        manifest = Manifest((Artifact("job1", 0, "big.bin", url),))
        return fetch(manifest, self.root, self._store, OPTIONS)

    def break_off(self) -> None:
        """Fetch some ranges, but not all."""
        self.origin.fail("big.bin", NOTHING, ended_after(3 * RANGE), *[status(404)] * 9)
        with pytest.raises(FetchError):
            self.fetch()
        self.origin.faults.clear()
        assert (self.state / "big.bin.journal").exists()


@pytest.fixture
def place(origin: FaultyOrigin, store: PresignedStore, tmp_path: Path) -> Place:
    origin.put("big.bin", CONTENT)
    return Place(origin, store, tmp_path / "down")


def test_a_file_without_a_record_that_rotted_is_fetched_again(place: Place) -> None:
    place.break_off()
    first = (place.state / "big.bin.journal").read_text().splitlines()[0]
    place.fetch()
    record = json.loads((place.state / "big.bin.record").read_text())
    lines = [first, *map(json.dumps, record["ranges"])]
    (place.state / "big.bin.journal").write_text("\n".join(lines) + "\n")
    (place.state / "big.bin.record").unlink()
    with place.final.open("r+b") as file:
        file.seek(2 * RANGE + 5)
        file.write(b"rot")
    assert not place.fetch().files[0].reused
    assert place.final.read_bytes() == CONTENT


def test_an_origin_that_has_no_ranges_any_more_sends_the_whole(place: Place) -> None:
    place.break_off()
    place.origin.fail("big.bin", ignore_range, ignore_range)
    assert place.fetch().fetched_bytes == len(CONTENT)
    assert place.final.read_bytes() == CONTENT


def test_another_size_is_another_object_where_there_is_no_version(place: Place) -> None:
    def without_version(content: bytes) -> Fault:
        def fault(handler: FaultyHandler) -> bool:
            if "Range" not in handler.headers:
                return answer(200, content)(handler)
            start, last = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
            piece = content[start : last + 1]
            span = f"bytes {start}-{start + len(piece) - 1}/{len(content)}"
            return answer(206, piece, Content_Range=span)(handler)

        return fault

    place.origin.fail("big.bin", *[without_version(CONTENT)] * 20)
    assert place.fetch().files[0].size_bytes == len(CONTENT)
    assert place.fetch().fetched_bytes == 0
    place.origin.faults.clear()
    place.origin.fail("big.bin", *[without_version(CONTENT[:-9])] * 20)
    assert place.fetch().files[0].size_bytes == len(CONTENT) - 9
    assert place.final.read_bytes() == CONTENT[:-9]
