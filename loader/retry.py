"""When to ask again, and after which pause."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception
from tenacity.nap import sleep_using_event

from loader.errors import LoaderError, TransientError

_PROGRESS_BYTES = 1 << 16  # a try that brought so much more was not in vain
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 20.0
_LONGEST_ASKED_S = 60.0
_Out = TypeVar("_Out")


class Tries:
    """How many tries have been in vain: those that came no further than any before.

    *place* is where the first one begins. They are over after *retries*, or when nothing has come
    for *deadline_s*.
    """

    def __init__(self, retries: int, deadline_s: float = math.inf, place: int = 0) -> None:
        self._retries = retries
        self._deadline_s = deadline_s
        self._furthest = place
        self._in_vain = 0
        self._since = time.monotonic()

    def note(self, place: int, error: LoaderError) -> None:
        """Take note of a try that ended at *place* with *error*."""
        if place - self._furthest >= _PROGRESS_BYTES:
            self._furthest, self._in_vain, self._since = place, 0, time.monotonic()
        elif not (isinstance(error, TransientError) and error.hasty):
            self._in_vain += 1

    def are_over(self, _: RetryCallState) -> bool:
        """Return whether to give up."""
        late = time.monotonic() - self._since > self._deadline_s
        return late or self._in_vain > self._retries


def retrying(
    gives_up: Callable[[RetryCallState], bool],
    stop: threading.Event,
    pause: Callable[[float], None] | None = None,
) -> Retrying:
    """Return tenacity's loop for errors that are ``retryable``; *stop* ends a pause.

    *pause* waits for so many seconds, or for what it knows to be worth no waiting.
    """
    return Retrying(
        retry=retry_if_exception(lambda e: isinstance(e, LoaderError) and e.retryable),
        stop=lambda state: stop.is_set() or gives_up(state),
        wait=wait_s,
        sleep=pause or sleep_using_event(stop),
        reraise=True,
    )


def ask_again(ask: Callable[[], _Out], retries: int) -> _Out:
    """Return what *ask* does, which is called up to *retries* times more after passing failures."""
    return retrying(lambda state: state.attempt_number > retries, threading.Event())(ask)


def wait_s(state: RetryCallState) -> float:
    """Return the pause after tenacity's last attempt."""
    return pause_s(state.outcome.exception() if state.outcome else None, state.attempt_number)


def pause_s(error: BaseException | None, attempt: int) -> float:
    """Return the pause: doubled each time, capped, jittered, never less than was asked for."""
    asked_s = float(getattr(error, "retry_after_s", None) or 0.0)
    doubled_s = min(_FIRST_WAIT_S * (1 << min(attempt - 1, 10)), _LONGEST_WAIT_S)
    return max(min(asked_s, _LONGEST_ASKED_S), doubled_s * random.uniform(0.5, 1.0))
