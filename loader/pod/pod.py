"""One pod, from its first second to its exit code.

    listen -> answer probes -> start the engine's process -> prepare -> load -> hand the port over
    -> wait, passing signals on -> answer again once the engine has drained

The pod's process stays the engine's parent: as PID 1 it has signals to pass on, a limit for the end
to keep, orphans to reap and an exit code to give, which ``exec`` could not all do.

The main thread only waits: for the model, which another thread prepares, for the engine, and for
signals. So a signal is heeded at once, whatever library is at work.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from loader.config.values import user_path
from loader.errors import ConfigError, EngineError
from loader.fetch.progress import Progress
from loader.peers import serve_peers_on
from loader.pod.address import serving_address
from loader.pod.engine import EngineDrained, EngineGone, EngineLoaded, EngineProcess
from loader.pod.signals import Signals, StopSignal, reap_orphans
from loader.serve.vllm.arguments import sizing_arguments, written
from loader.serve.vllm.releases import RANGE, installed_versions
from loader.status.boot_server import BootServer, listen
from loader.status.state import BootState
from loader.timeline import Timeline
from loader.types import ReadyModel

if TYPE_CHECKING:
    from loader.config.settings import Settings

KILL_AFTER_S = 5.0
"""Past ``drain_timeout_s`` the engine is killed."""
_FIRST_PROCESS = 1
_CONFIG = "config.json"
_UNKNOWN = ReadyModel(Path("model"), (), None, Path("model"), {})  # until the files are here


@dataclass(frozen=True, slots=True)
class _Prepared:
    ready: ReadyModel


@dataclass(frozen=True, slots=True)
class _Failed:
    error: Exception


@dataclass(frozen=True, slots=True)
class _Asked:
    signal: int


_Event = _Prepared | _Failed | _Asked | EngineLoaded | EngineGone


class Pod:
    """Made in the main thread; answers probes from then on. A context manager: its end ends all.

    Raises:
        ConfigError: the port is taken, or what is given for vLLM names none that can be.
        EngineError: vLLM is not installed.
    """

    def __init__(self, settings: Settings, arguments: Sequence[str], timeline: Timeline) -> None:
        _check_engine(settings)
        if importlib.util.find_spec("vllm") is None:
            raise EngineError("vLLM is not installed", next_step=f"install vllm{RANGE}")
        address = serving_address((*written(settings.engine_args), *arguments))
        tls = address.tls()
        self._settings = settings
        self._arguments = tuple(arguments)
        self._address = address
        self._timeline = timeline
        self._state = BootState(timeline, arrived=self._file_arrived, configured=self._hint)
        self.holds = settings.on_failure == "hold"
        """Whether a failed start is to be told until a signal comes."""
        self._serving = self._ending = False
        self._folder: Path | None = None
        self._limit: threading.Timer | None = None
        self._preparing: threading.Thread | None = None
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._signals = Signals(self._signalled)
        self._listening = listen(address.host, address.port)
        self._answer = partial(BootServer, self._listening, self._state.boot, tls, address.lets_in)
        self._server = self._answer()
        self._engine = EngineProcess(self._listening, timeline, self._told)

    def __enter__(self) -> Pod:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending = True
        self._engine.close()
        self._server.stop()
        self._listening.close()
        self._signals.restore()

    @property
    def is_preparing(self) -> bool:
        """Whether a thread is still at work that nobody waits for any more."""
        return self._preparing is not None and self._preparing.is_alive()

    def start(self, config: Path | None, progress: Progress) -> None:
        """Prepare the model, load it, and hand the port over to the engine.

        *config* is the file that the settings are from.

        Raises:
            LoaderError: see ``loader.errors``.
            StopSignal: SIGTERM or SIGINT came before; what has been fetched is kept.
        """
        self._preparing = threading.Thread(
            target=self._prepare,
            args=(config, progress),
            name="prepare",
            daemon=True,
        )
        self._preparing.start()
        self._timeline.note(versions=installed_versions())
        try:
            while not self._serving:
                self._heed(self._events.get())
        except Exception as error:
            self._timeline.close()
            self._state.fail(error)
            raise

    def serve(self) -> int:
        """Return the exit code, when a signal or a crash has ended the engine.

        An end that nobody has asked for is a failure, whatever the engine calls it.
        """
        if os.getpid() == _FIRST_PROCESS:
            signal.signal(signal.SIGCHLD, lambda *_: reap_orphans(self._engine.pid))
        code = self._engine.wait()
        return code if code or self._limit else EngineError.exit_code

    def hold(self) -> None:
        """Answer probes with the failure until a signal comes; the engine's memory is free."""
        self._engine.close()
        while not isinstance(self._events.get(), _Asked):
            pass

    def _heed(self, event: _Event) -> None:
        match event:
            case _Prepared(ready):
                arguments = vllm_arguments(self._settings, ready, self._arguments)
                self._engine.load(arguments, canary=self._settings.canary)
            case EngineLoaded():
                self._server.stop()
                self._engine.go(self._state.ready())
                self._serving = True
                serve_peers_on(self._settings)
            case EngineGone():
                raise self._engine.error
            case _Failed(error):
                raise error
            case _Asked(number):
                raise StopSignal(number)

    def _prepare(self, config: Path | None, progress: Progress) -> None:
        try:
            from loader import boot
            from loader.pod.live_adapters import live_environment

            settings = self._settings
            self._engine.check(
                settings.engine_args,
                vllm_arguments(settings, _UNKNOWN, self._arguments),
                live_environment(settings, config) if config else {},
                self._address.arguments(),
            )
            self._folder = settings.training.download_folder.absolute()
            if settings.base_model and not settings.base_checkpoint:
                self._hint(user_path(settings.base_model) / _CONFIG)
            self._state.pass_on(progress)
            args = settings.engine_args | sizing_arguments(self._arguments)
            sized = replace(settings, engine_args=args)
            ready = boot.prepare(sized, self._state, self._timeline, ask=self._engine.ask_unbound)
            self._events.put(_Prepared(ready))
        except Exception as error:
            self._events.put(_Failed(error))

    def _told(self, event: EngineLoaded | EngineDrained | EngineGone) -> None:
        """Take the port back when the engine has drained: nobody is refused until the end."""
        if isinstance(event, EngineDrained):
            self._state.stop()
            self._server = self._answer()
        else:
            self._events.put(event)

    def _file_arrived(self, path: str) -> None:
        if self._folder is not None and PurePosixPath(path).name == _CONFIG:
            self._hint(self._folder / path)

    def _hint(self, config: Path) -> None:
        if config.is_file():
            self._engine.hint(config)

    def _signalled(self, number: int) -> None:
        """Stop the start, or let the engine drain; the second signal or the limit ends it at once.

        In the main thread, maybe in the midst of ``get``: SimpleQueue is made for that.
        """
        if self._ending or self._limit is not None:
            self._engine.kill()
        elif not self._serving:
            self._events.put(_Asked(number))
        else:
            self._engine.signal(signal.SIGTERM)
            limit_s = self._settings.drain_timeout_s + KILL_AFTER_S
            self._limit = threading.Timer(limit_s, self._engine.kill)
            self._limit.daemon = True
            self._limit.start()


def _check_engine(settings: Settings) -> None:
    if settings.engine != "vllm":
        raise ConfigError(
            "`podloader serve` is vLLM's server",
            where="engine",
            expected="vllm",
            got=settings.engine,
            next_step="leave engine out",
        )


def vllm_arguments(settings: Settings, ready: ReadyModel, given: Sequence[str]) -> tuple[str, ...]:
    """Return what ``vllm serve`` would be given; *given* stands last and wins."""
    from loader.serve.vllm.arguments import serve_arguments

    drain: tuple[str, ...] = ()
    if "shutdown_timeout" not in settings.engine_args:
        drain = ("--shutdown-timeout", str(round(settings.drain_timeout_s)))
    return serve_arguments(
        ready,
        settings.engine_args,
        served_model_name=settings.served_model_name,
        trust_remote_code=settings.trust_remote_code,
        extra=(*drain, *given),
    )
