"""Many small waits at once, on threads that nobody has to wait for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

_LOOK_S = 0.1
_In = TypeVar("_In")
_Out = TypeVar("_Out")


class StoppedError(Exception):
    """Another thread failed, or the user asked to stop."""


def map_on_threads(
    function: Callable[[_In], _Out],
    values: Sequence[_In],
    concurrency: int,
    stop: threading.Event | None = None,
) -> list[_Out]:
    """Return *function* of each value; the first failure, a signal or *stop* leaves the rest.

    Unlike an executor's, threads that still wait for an answer then hold nobody back.

    Raises:
        StoppedError: *stop* was set.
    """
    if len(values) < 2:
        return [function(value) for value in values]
    tasks = deque(enumerate(values))
    found: dict[int, _Out] = {}
    failures: list[BaseException] = []
    over = threading.Event()

    def work() -> None:
        while tasks and not over.is_set():
            try:
                place, value = tasks.popleft()
            except IndexError:
                return
            try:
                found[place] = function(value)
            except BaseException as error:
                failures.append(error)
            if failures or len(found) == len(values):
                over.set()

    for _ in range(min(concurrency, len(values))):
        threading.Thread(target=work, name="fetch-ask", daemon=True).start()
    try:
        while not over.wait(_LOOK_S):
            if stop is not None and stop.is_set():
                raise StoppedError("the fetch was stopped; what has arrived is kept")
    finally:
        over.set()
    if failures:
        raise failures[0]
    return [found[place] for place in range(len(values))]
