"""The number of connections follows what they bring."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loader.fetch.pace import FIRST, Pace

TICK_S = 0.05
MUCH = 1 << 50


def run(
    pace: Pace,
    rate: Callable[[int], float],
    seconds: float,
    start: float = 0.0,
    left_bytes: int = MUCH,
) -> float:
    """Tell *pace* of a world in which so many connections bring *rate* bytes a second."""
    now, total = start, 0.0
    while now < start + seconds:
        now += TICK_S
        total += rate(pace.limit) * TICK_S
        pace.tick(now, int(total), pace.limit, left_bytes)
    return now


def test_each_connection_brings_its_share() -> None:
    pace = Pace(16, 0.0)
    assert pace.limit == FIRST
    run(pace, lambda n: n * 50e6, 1.0)
    assert pace.limit == 16


def test_what_is_over_in_a_moment_is_not_worth_more() -> None:
    pace = Pace(16, 0.0)
    now = run(pace, lambda n: n * 50e6, 1.0, left_bytes=100_000_000)
    assert pace.limit == FIRST
    run(pace, lambda n: n * 50e6, 1.0, now, left_bytes=1_000_000_000)
    assert pace.limit == 16


@pytest.mark.parametrize(("useful", "most"), [(1, 4), (4, 4), (8, 8)])
def test_no_more_than_bring_something(useful: int, most: int) -> None:
    pace = Pace(64, 0.0)
    now = run(pace, lambda n: min(n, useful) * 50e6, 1.0)
    limits = []
    for _ in range(100):  # it tries more now and then, and goes back
        now = run(pace, lambda n: min(n, useful) * 50e6, 0.1, now)
        limits.append(pace.limit)
    assert min(limits) >= useful
    assert sorted(limits)[len(limits) // 2] <= 2 * most


def test_a_world_that_becomes_faster_is_noticed() -> None:
    pace = Pace(16, 0.0)
    now = run(pace, lambda n: min(n, 2) * 50e6, 1.0)
    assert pace.limit <= 8
    run(pace, lambda n: n * 50e6, 20.0, now)
    assert pace.limit == 16


def test_an_origin_that_is_busy_gets_half() -> None:
    pace = Pace(16, 0.0)
    now = run(pace, lambda n: n * 50e6, 1.0)
    for _ in range(16):  # every connection complains at once
        pace.slow_down(now)
    assert pace.limit == 8
    now = run(pace, lambda n: n * 50e6, 2.0, now)
    assert pace.limit == 8
    pace.slow_down(now + 1.0)
    assert pace.limit == 4


def test_it_comes_back_slowly() -> None:
    pace = Pace(16, 0.0)
    now = run(pace, lambda n: n * 50e6, 1.0)
    pace.slow_down(now)
    run(pace, lambda n: n * 50e6, 120.0, now)
    assert 8 < pace.limit <= 16


def test_one_connection_at_least() -> None:
    pace = Pace(1, 0.0)
    pace.slow_down(1.0)
    run(pace, lambda n: n * 50e6, 3.0)
    assert pace.limit == 1


def test_an_origin_that_is_slow_to_answer_is_waited_for() -> None:
    pace = Pace(16, 0.0)
    now = 0.0
    while now < 3.0:
        now += TICK_S
        pace.tick(now, 0, 0, MUCH)
    assert pace.limit == FIRST
    run(pace, lambda n: n * 50e6, 1.0, now)
    assert pace.limit == 16


def test_what_was_too_much_for_first_requests_is_too_much_for_ranges() -> None:
    pace = Pace(16, 0.0, first=16)
    now = run(pace, lambda n: n * 10.0, 1.0)
    assert pace.limit == 16
    pace.slow_down(now)
    pace.begin_again(16, now)
    run(pace, lambda n: n * 50e6, 2.0, now)
    assert pace.limit == 8


@pytest.mark.parametrize("first", [2, 16])
def test_it_begins_again_with_what_it_is_told(first: int) -> None:
    pace = Pace(16, 0.0, first=16)
    now = run(pace, lambda n: n * 10.0, 1.0)
    pace.begin_again(first, now)
    assert pace.limit == first
    run(pace, lambda n: n * 50e6, 1.0, now)
    assert pace.limit == 16
