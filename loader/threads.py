"""Many waits at once, on threads that nobody has to wait for; and one wait of many threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

_LOOK_S = 0.1
_In = TypeVar("_In")
_Out = TypeVar("_Out")
_Item = TypeVar("_Item")


def map_on_threads(
    function: Callable[[_In], _Out],
    values: Sequence[_In],
    concurrency: int,
    look: Callable[[], None] = lambda: None,
) -> list[_Out]:
    """Return *function* of each value; the first failure or a signal leaves the rest.

    So does what *look* raises, which is called ten times a second. Unlike an executor's, threads
    that are busy then hold nobody back, not even the end of the process.
    """
    if not values:
        return []
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
        threading.Thread(target=work, name="ask", daemon=True).start()
    try:
        while not over.wait(_LOOK_S):
            look()
    finally:
        over.set()
    if failures:
        raise failures[0]
    return [found[place] for place in range(len(values))]


class Broadcast(Generic[_Item]):
    """Items that come one after the other, for any number of threads that want all of them."""

    def __init__(self) -> None:
        self._items: list[_Item] = []
        self._is_over = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    @property
    def error(self) -> BaseException | None:
        """What ended it before its time, if something did."""
        return self._error

    def put(self, items: Iterable[_Item]) -> None:
        """Add *items*."""
        with self._changed:
            self._items.extend(items)
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Say that nothing comes any more, because of *error* if one is given; the first counts."""
        with self._changed:
            if not self._is_over:
                self._is_over, self._error = True, error
            self._changed.notify_all()

    def follow(self, timeout_s: float | None = None) -> Iterator[Sequence[_Item]]:
        """Yield all items from the first on, a few at a time; none after *timeout_s* without any.

        Raises:
            BaseException: the error that it ended with, as often as it is asked.
        """
        seen = 0
        while True:
            with self._changed:
                if seen == len(self._items) and not self._is_over:
                    self._changed.wait(timeout_s)
                fresh, is_over = self._items[seen:], self._is_over
            if is_over and self._error is not None:
                raise self._error
            if is_over and not fresh:
                return
            seen += len(fresh)
            yield fresh
