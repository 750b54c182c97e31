"""Sizes that the listing lacks."""

from __future__ import annotations

import pytest

from loader.fetch.sizes import ask_sizes
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest
from tests.origin import FaultyOrigin, status

COUNT = 40


@pytest.fixture
def manifest(origin: FaultyOrigin) -> Manifest:
    paths = [origin.put(f"{i}.bin", b"x" * i) for i in range(COUNT)]
    urls = [origin.sign(path.relative_to(origin.root).as_posix()) for path in paths]
    files = [Artifact("job1", 0, f"{i}.bin", url) for i, url in enumerate(urls)]
    known = Artifact("job1", 0, "known.bin", "http://127.0.0.1:9/", 7)
    return Manifest((*files[:30], known), left_out=tuple(files[30:]))


def told(manifest: Manifest) -> list[int | None]:
    return [a.size_bytes for a in (*manifest.files, *manifest.left_out)]


WHOLE = [*range(30), 7, *range(30, COUNT)]


def test_one_byte_of_each_is_asked_for(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest
) -> None:
    found = ask_sizes(manifest, store, 4)
    assert told(found) == WHOLE
    assert not found.warnings
    assert [span for _, span in origin.requests] == ["bytes=0-0"] * COUNT


def test_a_passing_failure_is_asked_again(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest
) -> None:
    origin.fail("/7.bin", status(503), status(503))
    assert told(ask_sizes(manifest, store, 4)) == WHOLE


def test_one_that_is_not_told_leaves_the_others(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest
) -> None:
    origin.fail("/7.bin", status(404))
    origin.fail("/35.bin", status(404))
    found = ask_sizes(manifest, store, 1)
    lacking = {7, WHOLE.index(35)}
    assert told(found) == [None if i in lacking else WHOLE[i] for i in range(len(WHOLE))]
    assert found.warnings == (
        "the sizes of 2 of 40 files are unknown, such as that of job1/rank-0/7.bin: "
        "the object is not there (HTTP 404 Not Found, Fault)",
    )


def test_an_origin_that_does_not_answer_is_not_asked_for_each(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest
) -> None:
    origin.fail(".bin", *[status(503)] * 100)
    found = ask_sizes(manifest, store, 1)
    assert len(origin.requests) == 3
    assert told(found) == [None] * 30 + [7] + [None] * 10
    assert found.warnings[0].startswith("the sizes of 40 of 40 files are unknown, such as")
