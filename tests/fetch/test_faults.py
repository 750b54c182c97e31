"""The table in docs/failures.md, row by row: each fault on a real socket, in a whole fetch."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from loader.errors import (
    ChangedError,
    DeniedError,
    DiskError,
    ExpiredError,
    FetchError,
    TransientError,
)
from loader.fetch.snapshot import FetchOptions, fetch
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest
from tests.fetch.test_transfer import Noted
from tests.origin import (
    Fault,
    FaultyHandler,
    FaultyOrigin,
    act,
    answer,
    cut,
    hang_up,
    ignore_range,
    redirect,
    reset,
    slow,
    stall,
    status,
)

KIB = 1 << 10
CONTENT = random.Random(23).randbytes(700 * KIB + 1)
OPTIONS = FetchOptions(concurrency=2, retries=2, range_bytes=128 * KIB)
NOTHING = act(lambda: None)


@dataclass(frozen=True)
class Row:
    """What a request meets after the first, which asks for the version, and how the fetch ends."""

    faults: Sequence[Fault]
    error: type[FetchError] | None = None
    retries: int = 0
    first: Fault = field(default=NOTHING)


def s3_says(code: int, name: str) -> Fault:
    def fault(handler: FaultyHandler) -> bool:
        handler.refuse(code, name, "")
        return True

    return fault


WRONG = answer(206, b"x" * 9, Content_Range=f"bytes 1-9/{len(CONTENT)}")
ROWS = {
    "403, the URL has expired": Row([s3_says(403, "ExpiredToken")] * 9, ExpiredError),
    "403, refused": Row([s3_says(403, "AccessDenied")] * 9, DeniedError),
    "404": Row([status(404)] * 9, FetchError),
    "410": Row([status(410)] * 9, FetchError),
    "400": Row([status(400)] * 9, FetchError),
    "405": Row([status(405)] * 9, FetchError),
    "412": Row([status(412)] * 9, ChangedError),
    "416": Row([status(416)] * 9, ChangedError),
    "another range": Row([WRONG] * 9, FetchError),
    "408": Row([status(408)], retries=1),
    "425": Row([status(425)], retries=1),
    "429": Row([status(429)] * 2, retries=2),
    "500": Row([status(500)], retries=1),
    "502": Row([status(502)], retries=1),
    "503": Row([status(503)] * 2, retries=2),
    "504": Row([status(504)], retries=1),
    "500 again and again": Row([status(500)] * 99, TransientError),
    "501": Row([status(501)] * 9, FetchError),
    "reset": Row([reset, reset], retries=1),
    "closed without an answer": Row([hang_up, hang_up], retries=1),
    "a short body": Row([cut(100 * KIB)], retries=1),
    "silence": Row([stall(1.0)], retries=1),
    "slow": Row([slow(0.05)]),
    "no ranges": Row([ignore_range] * 9, first=ignore_range),
    "no ranges any more": Row([ignore_range] * 9, FetchError),
    "the version cannot be had at first": Row([], retries=1, first=status(503)),
}


@pytest.fixture
def manifest(origin: FaultyOrigin) -> Manifest:
    path = origin.put("big.bin", CONTENT).relative_to(origin.root).as_posix()
    return Manifest((Artifact("job1", 0, "big.bin", origin.sign(path)),))


@pytest.mark.parametrize("name", ROWS)
def test_each_fault_has_its_rule(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest, tmp_path: Path, name: str
) -> None:
    row, noted = ROWS[name], Noted()
    origin.fail("big.bin", row.first, *row.faults)
    final = tmp_path / "job1/rank-0/big.bin"
    if row.error is None:
        fetch(manifest, tmp_path, store, OPTIONS, noted)
        # A connection that died while it was idle is replaced without further ado.
        assert row.retries <= len(noted.retries) <= len(row.faults) + (row.first is not NOTHING)
    else:
        with pytest.raises(row.error) as caught:
            fetch(manifest, tmp_path, store, OPTIONS, noted)
        assert caught.type is row.error
        assert "Signature" not in str(caught.value)
        assert not final.exists()
        if row.error is not TransientError:
            assert noted.retries == [], "asked again in vain"
        origin.faults.clear()
        fetch(manifest, tmp_path, store, OPTIONS, noted)  # what came is no hindrance
    assert final.read_bytes() == CONTENT


def test_a_redirect_is_followed_and_the_next_request_asks_the_first_place_again(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest, tmp_path: Path
) -> None:
    path = origin.put("there.bin", CONTENT).relative_to(origin.root).as_posix()
    origin.fail("big.bin", *[redirect(origin.sign(path))] * 99)
    fetch(manifest, tmp_path, store, OPTIONS)
    assert (tmp_path / "job1/rank-0/big.bin").read_bytes() == CONTENT
    assert len(origin.ranges_of("big.bin")) == len(origin.ranges_of("there.bin"))


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "full"), (errno.EDQUOT, "full"), (errno.EIO, "refuses")]
)
def test_a_disk_that_refuses_stops_it_and_what_is_whole_stays(
    store: PresignedStore,
    manifest: Manifest,
    tmp_path: Path,
    number: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, left = os.pwrite, [300 * KIB]

    def fills(fd: int, data: memoryview, place: int) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(number, os.strerror(number))
        return write(fd, data, place)

    options = FetchOptions(concurrency=1, retries=2, range_bytes=64 * KIB)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fills)
        with pytest.raises(DiskError, match=said):
            fetch(manifest, tmp_path, store, options)
    assert fetch(manifest, tmp_path, store, options).fetched_bytes < len(CONTENT) - 200 * KIB
    assert (tmp_path / "job1/rank-0/big.bin").read_bytes() == CONTENT
