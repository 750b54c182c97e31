"""The engine's imports beside the download: they take as long as many a checkpoint does."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

from loader.fetch.progress import Progress
from loader.import_lock import importing
from loader.serve.vllm.forkserver import start_forkserver
from loader.timeline import Timeline

_LANE = "engine"
CONFIG = "config.json"


def import_vllm() -> None:
    """Import vLLM with its async engine and its OpenAI serving layer."""
    from loader.serve.vllm.private import import_server

    import_server()


def import_transformers() -> None:
    """Import transformers' models of text, and PEFT."""
    from peft import PeftModel  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


class EarlyImports(Progress):
    """A fetch's progress, passed on to *inner*; at the first request of a file the imports begin.

    So a download begins before torch is imported, and where all files are here already there is
    nothing to wait for. In a thread: sockets, checksums and writes of a download let go of the
    interpreter's lock (``benchmarks/imports.py``). Afterwards vLLM looks at each ``config.json``
    that has arrived below *folder*, and at a base's from elsewhere, when what it may know of them
    is here (*wait_kernels*). Told from many threads.
    """

    def __init__(
        self,
        engine: Literal["vllm", "transformers"],
        folder: Path,
        timeline: Timeline,
        inner: Progress,
        wait_kernels: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(inner)
        self._engine = engine
        self._folder = folder
        self._timeline = timeline
        self._wait_kernels = wait_kernels
        self._configs: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Return when all is done: no more files come.

        An import that failed is tried again by whoever starts the engine, and fails there with a
        reason.
        """
        self._begin()
        self._configs.put(None)
        assert self._thread is not None
        self._thread.join()

    def start(self, files: int, size_bytes: int, have_bytes: int) -> None:
        """Begin the imports where nothing is on its way."""
        super().start(files, size_bytes, have_bytes)
        if have_bytes >= size_bytes:
            self._begin()

    def begin_file(self, path: str, size_bytes: int, have_bytes: int) -> None:
        """Begin the imports: the first file is asked for."""
        super().begin_file(path, size_bytes, have_bytes)
        self._begin()

    def finish_file(self, path: str) -> None:
        """Note a model's config."""
        super().finish_file(path)
        if PurePosixPath(path).name == CONFIG:
            self.look_at(self._folder / path)

    def found_config(self, config: Path) -> None:
        """Note a base model's config."""
        super().found_config(config)
        self.look_at(config)

    def look_at(self, config: Path) -> None:
        """Let vLLM look at a model's *config* when it is imported."""
        self._configs.put(config)

    def _begin(self) -> None:
        with self._lock:
            if self._thread is None:
                if self._engine == "vllm":
                    start_forkserver()
                self._thread = threading.Thread(target=self._run, name="imports", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        with importing:
            failed = self._stage("engine import", _IMPORTS[self._engine])
        self._wait_kernels()
        while (config := self._configs.get()) is not None:
            if self._engine == "vllm" and not failed and config.is_file():
                self._stage("model class", partial(_inspect, config))

    def _stage(self, name: str, work: Callable[[], None]) -> str:
        """Return the type of the error that *work* failed with, empty where it did not."""
        begun = self._timeline.begin(name, lane=_LANE)
        failed = ""
        try:
            work()
        except Exception as error:
            failed = type(error).__name__
        self._timeline.end(begun, failed=failed)
        return failed


def _inspect(config: Path) -> None:
    from loader.serve.vllm.openai_server import inspect_model

    inspect_model(config)


_IMPORTS: dict[str, Callable[[], None]] = {
    "vllm": import_vllm,
    "transformers": import_transformers,
}
