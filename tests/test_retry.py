"""Pauses between tries."""

from __future__ import annotations

import threading

import pytest
from tenacity import RetryCallState, Retrying

from loader.errors import FetchError, TransientError
from loader.retry import ask_again, retrying, wait_s


def state(attempt: int, asked_s: float | None = None) -> RetryCallState:
    """Return tenacity's state after so many tries, the last of which asked for a pause."""
    error = TransientError("busy")
    error.retry_after_s = asked_s
    found = RetryCallState(Retrying(), None, (), {})
    found.attempt_number = attempt
    found.set_exception((TransientError, error, None))
    return found


@pytest.mark.parametrize(("attempt", "most_s"), [(1, 0.2), (2, 0.4), (3, 0.8), (8, 20), (99, 20)])
def test_pauses_are_doubled_capped_and_jittered(attempt: int, most_s: float) -> None:
    pauses = {wait_s(state(attempt)) for _ in range(50)}
    assert len(pauses) > 1
    assert all(most_s / 2 <= pause <= most_s for pause in pauses)


@pytest.mark.parametrize(("asked_s", "least_s"), [(7, 7), (3600, 60)])
def test_the_origin_may_ask_for_a_longer_one_up_to_a_minute(asked_s: float, least_s: float) -> None:
    assert wait_s(state(1, asked_s)) == least_s


def test_errors_that_do_not_pass_are_raised_at_once() -> None:
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        raise FetchError("no")

    with pytest.raises(FetchError):
        retrying(lambda _: False, threading.Event())(fail)
    assert len(tries) == 1


def test_a_stop_ends_a_pause() -> None:
    stop = threading.Event()

    def fail() -> None:
        threading.Timer(0.05, stop.set).start()
        error = TransientError("busy")
        error.retry_after_s = 60
        raise error

    with pytest.raises(TransientError):
        retrying(lambda _: False, stop)(fail)
    assert stop.is_set()


def test_what_passes_is_asked_again_so_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loader.retry._FIRST_WAIT_S", 0.0)
    left = [TransientError("busy")] * 3

    def ask() -> str:
        if left:
            raise left.pop()
        return "there"

    with pytest.raises(TransientError):
        ask_again(ask, 1)
    assert len(left) == 1
    assert ask_again(ask, 1) == "there"
