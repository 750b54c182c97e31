"""vLLM in this process, loaded by a thread while its weights arrive."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path

from loader.arriving.filling import FillingFolder
from loader.errors import LoaderError
from loader.serve.model import ServedModel
from loader.serve.vllm.inprocess import CORE
from loader.serve.vllm.streaming import (
    LOAD_FORMAT,
    Stream,
    ready_timeout_s,
    stream_environment,
    too_late,
)
from loader.timeline import Open, Timeline
from loader.types import ReadyModel

_log = logging.getLogger("podloader")


@functools.cache
def _limit_s() -> float:
    """Return the limit that holds for all starts of this process; the first one lifts vLLM's."""
    return ready_timeout_s()


class StreamedStart:
    """The engine that *start*, given a load format, returns for a model that it follows.

    ``announce`` begins it, ``finish`` or ``abort`` is its end. Made before vLLM is imported, whose
    limit it lifts: whether a start goes on, the fetch decides. The limit counts from ``finish`` on.
    """

    def __init__(
        self,
        cache: Path,
        served_model_name: str | None,
        start: Callable[[ReadyModel, str | None], ServedModel],
        timeline: Timeline,
    ) -> None:
        self._limit_s = _limit_s()
        self._others = {child.pid for child in active_children()}
        os.environ.update(stream_environment())
        self._cache, self._name, self._start = cache, served_model_name, start
        self._timeline = timeline
        self._stream: Stream | None = None
        self._thread: threading.Thread | None = None
        self._model: ServedModel | None = None
        self._error: Exception | None = None
        self._weights: Open | None = None

    def announce(self, filling: FillingFolder, ready: ReadyModel) -> None:
        """Begin to load *ready*, whose weights *filling* brings; see ``Announce``."""
        try:
            stream = Stream(self._cache, filling, ready, self._name, self._tell)
        except (LoaderError, OSError) as error:
            _log.warning("engine start: files, not streamed: %s", error)
            return
        _log.info("engine start: stream: the weights are loaded as they arrive")
        self._stream = stream
        self._thread = threading.Thread(target=self._load, args=(stream.ready,), name="engine")
        self._thread.daemon = True
        self._thread.start()

    def finish(self, ready: ReadyModel) -> ServedModel:
        """Return the engine over *ready*, all of which is proved; over the files if need be.

        Raises:
            LoaderError: it failed, and files would not help.
        """
        with self._limited():
            followed = self._finish(ready)
        if followed is not None:
            return followed
        with self._limited():
            return self._start(ready, None)

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        """End the engine that a block waits for, if it takes too long."""
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            for core in self._cores():
                core.kill()

        timer = threading.Timer(self._limit_s, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        except Exception as error:
            if is_late.is_set():
                raise too_late(self._limit_s) from error
            raise
        finally:
            timer.cancel()

    def _cores(self) -> list[BaseProcess]:
        """Return the engine's processes that this start has begun."""
        found = (child for child in active_children() if child.name.startswith(CORE))
        return [child for child in found if child.pid not in self._others]

    def _finish(self, ready: ReadyModel) -> ServedModel | None:
        if self._stream is None or self._thread is None:
            return None
        stream = self._stream
        why = stream.publish(ready)
        if why:
            stream.feed.close()
        self._thread.join()
        if self._model is not None and not why and stream.feed.wait_taken():
            stream.finish()
            return self._model
        why = why or stream.feed.wait_broken()
        if self._error is not None and not why:
            stream.close()
            raise self._error
        _log.warning("engine start: files, not streamed: %s", why or "it was not followed")
        self._end()
        return None

    def abort(self, error: BaseException) -> None:
        """End the engine, as soon as that can be: the model is not to be had."""
        if self._stream is None or self._thread is None:
            return
        self._stream.feed.end(error)
        self._stream.feed.close()
        for core in self._cores():  # which may take its time until it asks for a weight
            core.terminate()
        with self._limited():
            self._thread.join()
        self._error = None  # it holds all that the engine's start had
        self._end()

    def _end(self) -> None:
        if self._model is not None:
            self._model.close()
        if self._weights is not None:
            self._timeline.end(self._weights, stopped=True)
            self._weights = None
        assert self._stream is not None
        self._stream.close()

    def _load(self, ready: ReadyModel) -> None:
        try:
            self._model = self._start(ready, LOAD_FORMAT)
        except Exception as error:
            self._error = error

    def _tell(self, done: int, total: int) -> None:
        """Note the stage that waits for weights."""
        if self._weights is None and not done:
            self._weights = self._timeline.begin("weights", lane="engine")
        elif self._weights is not None and done == total:
            begun, self._weights = self._weights, None
            self._timeline.end(begun)
