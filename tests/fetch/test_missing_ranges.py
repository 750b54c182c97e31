"""Ranges are arithmetic: nothing twice, nothing left out."""

from __future__ import annotations

import itertools
import random

import pytest
from awscrt.checksums import crc64nvme

from loader.fetch.missing_ranges import (
    DoneRange,
    Range,
    combine,
    digest_text,
    guided_bytes,
    missing_ranges,
    sound_ranges,
)


def test_a_new_file_is_one_hole() -> None:
    assert missing_ranges((), 10) == (Range(0, 10),)
    assert missing_ranges((), 0) == ()


def test_what_an_earlier_run_left() -> None:
    done = (DoneRange(2, 4, 0), DoneRange(4, 6, 0), DoneRange(9, 10, 0))
    assert missing_ranges(done, 12) == (Range(0, 2), Range(6, 9), Range(10, 12))


def test_requests_are_large_first_and_small_at_the_end() -> None:
    assert guided_bytes(1000, 1000, workers=2, range_bytes=10) == 80
    assert guided_bytes(1000, 100, workers=2, range_bytes=10) == 50
    assert guided_bytes(1000, 30, workers=2, range_bytes=10) == 10
    assert guided_bytes(11, 11, workers=2, range_bytes=10) == 11  # no request for one byte
    assert guided_bytes(4, 1000, workers=2, range_bytes=10) == 4


@pytest.mark.parametrize("seed", range(20))
def test_done_and_missing_make_up_the_file(seed: int) -> None:
    chance = random.Random(seed)
    claimed = []
    for _ in range(10):
        start = chance.randrange(0, 100)
        claimed.append(DoneRange(start, start + chance.randrange(0, 30), 0))
    done = sound_ranges(claimed, 100)
    pieces = sorted(
        [(r.start, r.end) for r in done] + [(r.start, r.end) for r in missing_ranges(done, 100)]
    )
    assert pieces[0][0] == 0
    assert pieces[-1][1] == 100
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))


def test_ranges_that_no_journal_should_hold() -> None:
    claimed = [DoneRange(-1, 4, 0), DoneRange(0, 4, 1), DoneRange(2, 6, 2), DoneRange(8, 11, 3)]
    assert sound_ranges(claimed, 10) == (DoneRange(0, 4, 1),)


def test_the_digest_of_pieces_is_that_of_the_whole() -> None:
    data = random.Random(0).randbytes(1000)
    done = [DoneRange(a, b, crc64nvme(data[a:b])) for a, b in [(0, 1), (1, 400), (400, 1000)]]
    assert combine(done) == digest_text(crc64nvme(data))
    # The check value of CRC-64/NVME, in the catalogue of parametrised CRC algorithms.
    assert crc64nvme(b"123456789") == 0xAE8B14860A799888
    assert digest_text(0xAE8B14860A799888) == "crc64nvme:rosUhgp5mIg="
