"""A range that is wanted now, in memory: by as many requests as it takes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from loader.errors import TransientError
from loader.http.objects import ObjectInfo
from loader.retry import Tries, retrying
from loader.stores.base import Store
from loader.types import Artifact


def read_range(
    artifact: Artifact,
    store: Store,
    info: ObjectInfo,
    start: int,
    buffer: memoryview,
    retries: int,
    on_retry: Callable[[str], None] = lambda reason: None,
    *,
    on_bytes: Callable[[int], None] = lambda done: None,
    stop: threading.Event | None = None,
) -> None:
    """Fill *buffer* from *start* on, with the bytes of *info*'s version.

    It goes on where a connection broke off. *on_retry* is told why, *on_bytes* how many are there;
    *stop* ends the tries.

    Raises:
        FetchError: the origin does not give the bytes, or the object changed.
    """
    tries, done = Tries(retries), 0
    end = start + len(buffer)
    for attempt in retrying(tries.are_over, stop or threading.Event()):
        with attempt:
            done = done if info.ranges else 0
            try:
                stream = store.open_range(
                    artifact, start + done, end if info.ranges else info.size_bytes, info
                )
                with contextlib.closing(stream):
                    while done < len(buffer) and (count := stream.readinto(buffer[done:])):
                        done += count
                        on_bytes(done)
                if done < len(buffer):
                    raise TransientError("the body ended before its length", where=artifact.source)
            except TransientError as error:
                tries.note(done, error)
                on_retry(error.what)
                raise
