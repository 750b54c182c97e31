"""Many waits at once: in order, at once where one fails, and nobody waits for the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from loader.threads import Broadcast, map_on_threads


class EndedError(Exception):
    """Ends the waiting."""


@pytest.fixture
def stuck() -> Iterator[Callable[[int], None]]:
    """Fails for 0; for any other number it waits until the test is over."""
    over = threading.Event()

    def work(number: int) -> None:
        if not number:
            raise EndedError
        over.wait()

    yield work
    over.set()


def test_results_come_in_the_order_of_the_values() -> None:
    second = threading.Event()

    def work(number: int) -> int:
        if number == 1:
            second.wait()
        second.set()
        return number * number

    assert map_on_threads(work, (1, 2, 3), 2) == [1, 4, 9]
    assert map_on_threads(work, (), 2) == []


def test_nobody_waits_for_those_that_are_busy_when_one_fails(
    stuck: Callable[[int], None],
) -> None:
    with pytest.raises(EndedError):
        map_on_threads(stuck, (1, 2, 0, 3), 3)


@pytest.mark.parametrize("values", [(1,), (1, 2)])
def test_what_look_raises_ends_the_wait(
    stuck: Callable[[int], None], values: tuple[int, ...]
) -> None:
    def look() -> None:
        raise EndedError

    with pytest.raises(EndedError):
        map_on_threads(stuck, values, 2, look)


def test_everyone_hears_all_of_a_broadcast() -> None:
    told: Broadcast[int] = Broadcast()
    early = told.follow(0.001)
    heard: list[int] = []
    told.put((1, 2))
    assert list(next(early)) == [1, 2]
    assert list(next(early)) == []  # nothing came in the time
    thread = threading.Thread(
        target=lambda: heard.extend(n for some in told.follow() for n in some)
    )
    thread.start()
    told.put((3,))
    told.end()
    told.end(EndedError())  # too late
    thread.join()
    assert heard == [n for some in told.follow() for n in some] == [1, 2, 3]
    assert list(next(early)) == [3]
    assert next(early, None) is None
    assert told.error is None


def test_the_error_that_ends_a_broadcast_is_everyones() -> None:
    told: Broadcast[int] = Broadcast()
    told.end(EndedError())
    for _ in range(2):
        with pytest.raises(EndedError):
            list(told.follow())
