"""Coroutines and streams on another thread's loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator

import pytest

from loader.serve.vllm.loop import LoopThread


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread("test", asyncio.new_event_loop)
    yield thread
    thread.close()
    assert not thread.alive


class Source:
    """A stream that never ends by itself and knows where it ran and how it ended."""

    def __init__(self) -> None:
        self.threads: set[str] = set()
        self.closed = threading.Event()

    async def __call__(self) -> AsyncGenerator[int, None]:
        try:
            number = 0
            while True:
                self.threads.add(threading.current_thread().name)
                yield number
                number += 1
                await asyncio.sleep(0.001)
        finally:
            self.closed.set()


async def test_stream_runs_there_and_is_closed_there(loop: LoopThread) -> None:
    source = Source()
    stream = loop.stream(source())
    assert [await anext(stream) for _ in range(3)] == [0, 1, 2]
    await stream.aclose()
    assert await asyncio.to_thread(source.closed.wait, 5)
    assert source.threads == {"test"}


async def test_cancelling_the_reader_closes_the_stream(loop: LoopThread) -> None:
    source = Source()

    async def read() -> None:
        async for _ in loop.stream(source()):
            pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait([task])
    assert await asyncio.to_thread(source.closed.wait, 5)


async def test_cancelling_the_caller_cancels_the_work(loop: LoopThread) -> None:
    cancelled = threading.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    task = asyncio.create_task(loop.run(work()))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait([task])
    assert await asyncio.to_thread(cancelled.wait, 5)


async def test_errors_cross_over(loop: LoopThread) -> None:
    async def broken() -> AsyncGenerator[int, None]:
        yield 1
        raise ValueError("in the stream")

    stream = loop.stream(broken())
    assert await anext(stream) == 1
    with pytest.raises(ValueError, match="in the stream"):
        await anext(stream)


async def test_closing_the_thread_ends_its_streams(loop: LoopThread) -> None:
    stream = loop.stream(Source()())
    await anext(stream)
    loop.close()
    with pytest.raises(asyncio.CancelledError):
        async for _ in stream:
            pass


def test_each_caller_may_bring_a_loop_of_its_own(loop: LoopThread) -> None:
    async def work() -> str:
        return threading.current_thread().name

    async def ask() -> str:
        return await loop.run(work())

    assert {asyncio.run(ask()), asyncio.run(ask())} == {"test"}
