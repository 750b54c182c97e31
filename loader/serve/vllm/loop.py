"""An event loop of one's own, reached from every thread and from every other loop.

vLLM's engine belongs to the loop that it is created on. Truss calls ``load()`` in a thread that
has none and ``predict()`` on the server's; a script may use a new loop for each question. So the
engine gets a loop in a thread of its own, which lives as long as the engine, and no caller's loop
is ever slowed by tokenizing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


class LoopThread:
    """A daemon thread that runs one event loop until ``close``."""

    def __init__(self, name: str, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self._loop = new_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether coroutines are still taken."""
        return self._thread.is_alive() and self._loop.is_running()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run *work* on the loop and block until it is done."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run *work* on the loop; cancelling the caller cancels it."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def stream(self, source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Yield what *source* yields on the loop; closing this closes *source* there.

        Items wait in a queue without bound: a slow reader must not hold up the engine.
        """
        here = asyncio.get_running_loop()
        arrived: asyncio.Queue[T | _End] = asyncio.Queue()

        async def pump() -> None:
            end = _End(None)
            try:
                async for item in source:
                    here.call_soon_threadsafe(arrived.put_nowait, item)
            except BaseException as error:
                end = _End(error)
                raise
            finally:
                await source.aclose()
                if not here.is_closed():
                    here.call_soon_threadsafe(arrived.put_nowait, end)

        pumping = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while not isinstance(item := await arrived.get(), _End):
                yield item
            if item.error is not None:
                raise item.error
        finally:
            pumping.cancel()

    def close(self) -> None:
        """Cancel what still runs and end the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()
