"""Processes for vLLM's engine that are forks of one that has imported it and runs no threads.

In a process that runs threads (Truss's server, a notebook, torch's OpenMP after a merge) vLLM
spawns its engine's processes, one below the other, and each imports all of vLLM anew. Python's fork
server imports it once, in a process of its own and while this one still fetches; the engine's
processes are forks of that one and share its pages.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from loader.serve.vllm.bound import Names, Reason, ask_unbound

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
_KEPT = "OMP_NUM_THREADS"  # OpenMP has read the fork server's own, see import_engine
_SAFE_PATH = "PYTHONSAFEPATH"
_PRELOADED = "loader.serve.vllm.preloaded"
_lock = threading.Lock()
_started = threading.Event()


class EngineProcess(ForkServerProcess):
    """A process that runs in the environment of its starter, as a spawned one would."""

    def start(self) -> None:
        """Start it; vLLM sets variables around this call."""
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        """Do the work that it was given."""
        kept = {_KEPT: os.environ[_KEPT]} if _KEPT in os.environ else {}
        os.environ.clear()
        # Its own children may be forks of it: vLLM spawns them where that will not do.
        os.environ.update(self._environment | kept | {METHOD: "fork"})
        super().run()


class EngineContext(ForkServerContext):
    """The ``multiprocessing`` context of ``EngineProcess``."""

    Process = EngineProcess


def start_forkserver() -> None:
    """Begin to import vLLM in the fork server, and return at once; a second call does nothing.

    Nothing happens where ``VLLM_WORKER_MULTIPROC_METHOD`` says how vLLM is to start its processes.
    """
    with _lock:
        if _started.is_set() or METHOD in os.environ:
            return
        multiprocessing.set_forkserver_preload([_PRELOADED])
        with _safe_path():
            forkserver.ensure_running()
        _started.set()


def ask_forked(
    model: Path, engine_args: Mapping[str, object], adapters: Names
) -> Mapping[str, Reason]:
    """Return why vLLM would not use all of an adapter, by its name, as ``ask_unbound`` does.

    Empty where vLLM is not here to say it: its workers will.
    """
    start_forkserver()
    if not _started.is_set() or find_spec("vllm") is None:
        return {}
    context = EngineContext()
    ours, theirs = context.Pipe(duplex=False)
    arguments = (theirs, model, dict(engine_args), dict(adapters))
    process = context.Process(target=_answer, args=arguments)
    process.start()
    theirs.close()
    try:
        found: Mapping[str, Reason] = ours.recv()
        return found
    except EOFError:
        return {}
    finally:
        process.join()
        ours.close()


def _answer(connection: Connection, *question: Any) -> None:
    connection.send(ask_unbound(*question))


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """Let a process that starts in this block take no file of the working folder for a module.

    What it runs later has the module path of its starter.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before


@contextlib.contextmanager
def forked_engine(args: Any) -> Iterator[None]:
    """Let vLLM start its engine from the fork server in this block, if that was started.

    *args* are vLLM's; binding to NUMA nodes needs processes that are spawned.
    """
    if not _started.is_set() or getattr(args, "numa_bind", False):
        yield
        return
    from loader.serve.vllm.private import process_context

    def make(own: Callable[[], Any]) -> EngineContext:
        own()  # it sets variables for the engine's processes
        return EngineContext()

    with process_context(make):
        yield
