"""What vLLM makes of models that podloader prepares while it loads them, and of their files.

``python -m tests.serve.vllm.loaded_ways CASES`` reads ``{way: config document}`` and prints
``{way: {"from", "arriving", "files"}}``: how the weights came, and the digests of all parameters
and buffers, of what was announced and of the folder that was prepared.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, TextIO

from loader.types import STREAM_VARIABLE, ReadyModel
from tests.serve.vllm.loaded_weights import begin, load

_REQUEST_S = 300


class Arriving:
    """Loads, in a thread of its own, what is announced."""

    def __init__(self, cache: Path, name: str) -> None:
        self.tensors: dict[str, str] = {}
        self._cache, self._name = cache, name
        self._stream: Any = None
        self._errors: list[BaseException] = []
        self._thread: threading.Thread | None = None

    def __call__(self, filling: Any, ready: ReadyModel) -> None:
        from loader.serve.vllm.streaming import Stream

        def ignore(done: int, total: int) -> None:
            """Nobody is told how far it is."""

        self._stream = Stream(self._cache, filling, ready, self._name, ignore)
        self._thread = threading.Thread(target=self._load, daemon=True)
        self._thread.start()

    def _load(self) -> None:
        from loader.serve.vllm.streaming import LOAD_FORMAT

        try:
            self.tensors = load(self._stream.ready.path, LOAD_FORMAT)
        except BaseException as error:
            self._errors.append(error)

    def finish(self, ready: ReadyModel) -> str:
        """Return how the weights of *ready* came."""
        if self._thread is None:
            return "files"
        self._thread.join(_REQUEST_S)
        if self._errors:
            raise self._errors[0]
        assert self._stream.feed.wait_taken()
        why: str = self._stream.publish(ready)
        self._stream.close()
        return why or "stream"


def prepare_and_load(document: dict[str, Any]) -> dict[str, Any]:
    """Return what vLLM makes of one model, both ways."""
    from loader import boot
    from loader.config.settings import Settings
    from loader.prepare.consolidated import cache_folder

    settings = Settings.load(document)
    arriving = Arriving(cache_folder(settings), "served")
    ready = boot.prepare(settings, ask=lambda model, adapters: {}, announce=arriving)
    found = {"from": arriving.finish(ready), "arriving": arriving.tensors}
    return found | {"files": load(ready.path, "auto")}


def main(cases: dict[str, Any], answer: TextIO) -> None:
    """Write what becomes of *cases* to *answer*."""
    os.environ[STREAM_VARIABLE] = "1"
    os.environ["VLLM_TARGET_DEVICE"] = "cpu"
    from loader.serve.vllm import streamed_weights

    streamed_weights._SMALL_BYTES = 8192  # tiny models have tensors of both sorts
    with tempfile.TemporaryDirectory() as name, answer:
        begin(Path(name))
        json.dump({way: prepare_and_load(document) for way, document in cases.items()}, answer)


if __name__ == "__main__":
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes log lines there
    main(json.loads(Path(sys.argv[1]).read_text()), told)
