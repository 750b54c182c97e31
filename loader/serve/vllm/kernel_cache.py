"""vLLM's compiled kernels from pod to pod: brought before the engine starts, published by one.

::

    <VLLM_CACHE_ROOT>/podloader/<image and arguments>/    or below cache_folder, or the user's cache
      vllm/  triton/  inductor/  flashinfer/  cuda/       what vLLM and its libraries keep
      .archive                                            which archive is in them already

The folder is the engine's alone, so that all in it is of this image and these arguments, and an
archive of it is what another pod needs. Whatever goes wrong is one warning, and vLLM compiles.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loader.arriving.standins import EnginePath
from loader.errors import DiskError, FormatError, LoaderError
from loader.serve.model import base_name
from loader.serve.vllm.kernel_archive import STAMP, merge_into, pack, unpack
from loader.serve.vllm.kernel_facts import (
    facts_name,
    image_facts,
    machine_facts,
    relevant_arguments,
)
from loader.timeline import Timeline
from loader.types import ReadyModel
from loader.units import show_bytes, show_seconds

if TYPE_CHECKING:
    from loader.config.settings import Settings
    from loader.serve.vllm.kernel_places import KernelPlace

_ROOT = "VLLM_CACHE_ROOT"
_FOLDERS = {
    _ROOT: "vllm",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "CUDA_CACHE_PATH": "cuda",
}
# One of these for each program that was compiled, or architecture looked at; below them, what a
# start writes anew all the time.
_VARIANTS = ("torch_compile_cache/torch_aot_compile/*", "torch_compile_cache/*", "modelinfos/*")
_SUFFIX = ".kernels"
_RAY = "distributed-executor-backend=ray"
_PATIENCE_S = 60.0  # to compile is not worth more waiting
_LEAST_PRIORITY = 19
_log = logging.getLogger("podloader")


@dataclass(frozen=True, slots=True)
class _Found:
    """What was there when the pod started: which archive, and what it had in it."""

    name: str
    facts: Mapping[str, object]
    version: str | None
    usable: bool
    variants: frozenset[str]


class KernelCache:
    """What the settings say of vLLM's compiled kernels; without ``kernel_cache``, nothing happens.

    *words* are what ``vllm serve`` is given beside the model. ``begin`` brings what is there, on a
    thread; whoever starts vLLM does so in ``environment``, after that.

    Raises:
        ConfigError: the place cannot be one.
    """

    def __init__(self, settings: Settings, words: Sequence[str], timeline: Timeline) -> None:
        self._timeline = timeline
        self._publishes = settings.kernel_cache_publish
        self._location = settings.kernel_cache or ""
        self._place: KernelPlace | None = None
        self._found: _Found | None = None
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], object]] | None = None
        self._thread: threading.Thread | None = None
        self._root = Path()
        self._at: EnginePath | None = None
        self.environment: Mapping[str, str] = {}
        """Variables for the process that starts vLLM: before it imports that."""
        if not settings.kernel_cache or settings.engine != "vllm":
            return
        from loader.serve.vllm.kernel_places import open_place

        place = open_place(settings, settings.kernel_cache)
        self._image = image_facts(words)
        self._leaves = _RAY in relevant_arguments(words)
        given = os.environ.get(_ROOT)
        parent = Path(given, "podloader") if given else settings.user_cache / "kernels"
        self._root = parent.absolute() / facts_name(self._image)[:16]
        try:
            self._root.mkdir(0o700, parents=True, exist_ok=True)
        except OSError as error:
            _log.warning("kernel_cache is of no use, compiled kernels cannot be kept: %s", error)
            return
        self._place = place
        self.environment = {name: str(self._root / inner) for name, inner in _FOLDERS.items()}

    def begin(self) -> None:
        """Bring what is there, on a thread. Once."""
        if self._place is None:
            return
        self._waiting = []
        self._thread = threading.Thread(target=self._bring, name="kernels", daemon=True)
        self._thread.start()

    def then(self, act: Callable[[], object]) -> None:
        """Call *act* when nothing is on its way any more: now, or later on another thread."""
        with self._lock:
            if self._waiting is not None:
                self._waiting.append(act)
                return
        act()

    def wait(self) -> None:
        """Return when nothing is on its way any more."""
        if self._thread is not None:
            self._thread.join()

    def lead(self, ready: ReadyModel, cache: Path) -> ReadyModel:
        """Return *ready* at a path in *cache* that does not tell one model from another.

        The path is in the keys of all that vLLM compiles. The same as of weights that are streamed.
        Not with Ray, whose workers on other machines read the model at its own.
        """
        if self._place is None or self._leaves:
            return ready
        try:
            self._at = self._at or EnginePath.take(cache)
            self._at.publish(ready.path)
        except DiskError as error:
            _log.warning("compiled kernels are of this path alone: %s", error)
            return ready
        path = self._at.path
        return replace(
            ready,
            path=path,
            tokenizer=path if ready.tokenizer == ready.path else ready.tokenizer,
            provenance=ready.provenance | {"name": base_name(ready, None)},
        )

    def close(self) -> None:
        """Let another process have the path: the engine is gone."""
        at, self._at = self._at, None
        if at is not None:
            at.release()

    def publish(self) -> None:
        """Publish what the engine, which is ready, has compiled, on a thread that nobody awaits."""
        if self._found is not None and self._publishes:
            threading.Thread(target=self._publish, name="kernels", daemon=True).start()

    def _bring(self) -> None:
        begun = self._timeline.begin("kernel cache", lane="engine")
        failed = ""
        try:
            self._find()
        except Exception as error:
            failed = type(error).__name__
            _log.warning("no compiled kernels from %s: %s", self._location, error)
        self._timeline.end(begun, failed=failed)
        with self._lock:
            for act in self._waiting or ():
                act()
            self._waiting = None

    def _find(self) -> None:
        from loader.weights.publishing import scratch_folder

        assert self._place is not None
        facts = self._image | machine_facts()
        name = facts_name(facts) + _SUFFIX
        version = self._place.version(name)
        stamp = self._root / STAMP
        usable = version is not None
        if version is None:
            _log.info("%s has no kernels compiled for this machine and arguments", self._location)
        elif _read(stamp) == f"{name} {version}":
            _log.info("the compiled kernels of %s are here", self._location)
        else:
            with scratch_folder(self._root.parent, self._root.name) as scratch:
                usable = self._restore(name, facts, scratch)
            if usable:
                stamp.write_text(f"{name} {version}", encoding="utf-8")
        found = self._variants() if usable else frozenset()
        self._found = _Found(name, facts, version, usable, found)

    def _restore(self, name: str, facts: Mapping[str, object], scratch: Path) -> bool:
        """Return whether what is in the archive is here."""
        assert self._place is not None
        stop = threading.Event()
        patience = threading.Timer(_PATIENCE_S, stop.set)
        patience.daemon = True
        patience.start()
        try:
            file = self._place.get(name, scratch, stop)
        finally:
            patience.cancel()
        fresh = scratch / "unpacked"
        fresh.mkdir()
        try:
            unpack(file, fresh, facts)
        except FormatError as error:
            _log.warning("no compiled kernels from %s: %s", self._location, error)
            return False
        merge_into(fresh, self._root)
        _log.info("compiled kernels of %s: %s", self._location, show_bytes(file.stat().st_size))
        return True

    def _publish(self) -> None:
        found, place = self._found, self._place
        assert found is not None
        assert place is not None
        if found.usable and self._variants() <= found.variants:
            return
        with contextlib.suppress(OSError):  # of this thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
        begun = self._timeline.now_s
        try:
            size_bytes = self._write(found, place)
        except (LoaderError, OSError) as error:
            _log.warning("compiled kernels are not published to %s: %s", self._location, error)
            return
        took = show_seconds(self._timeline.now_s - begun)
        _log.info(
            "compiled kernels published to %s: %s in %s",
            self._location,
            show_bytes(size_bytes),
            took,
        )

    def _write(self, found: _Found, place: KernelPlace) -> int:
        from loader.weights.publishing import scratch_folder

        with scratch_folder(self._root.parent, self._root.name) as scratch:
            file = scratch / found.name
            pack(self._root, file, found.facts)
            place.put(found.name, file, anew=found.version is None)
            if (version := place.version(found.name)) is not None:
                (self._root / STAMP).write_text(f"{found.name} {version}", encoding="utf-8")
            return file.stat().st_size

    def _variants(self) -> frozenset[str]:
        folder = self._root / _FOLDERS[_ROOT]
        return frozenset(str(path) for pattern in _VARIANTS for path in folder.glob(pattern))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
