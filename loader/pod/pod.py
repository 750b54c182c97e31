"""One pod, from its first second to its exit code.

    listen -> answer probes -> start the engine's process -> prepare -> load -> hand the port over
    -> wait, passing signals on -> answer again once the engine has drained

Where weights are streamed, the engine loads while they arrive, and gets the port when it is ready
and all of them are proved; where it cannot follow them, another is started over the files.

Where a model is spread over nodes, each has a pod; only node 0's engine gets the port.

The pod's process stays the engine's parent: as PID 1 it has signals to pass on, a limit for the end
to keep, orphans to reap and an exit code to give, which ``exec`` could not all do.

The main thread only waits: for the model, which another thread prepares, for the engine, and for
signals. So a signal is heeded at once, whatever library is at work.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from loader.arriving.filling import Announce, FillingFolder
from loader.config.values import user_path
from loader.errors import EngineError, LoaderError
from loader.fetch.progress import Progress
from loader.peers import serve_peers_on
from loader.pod.address import serving_address
from loader.pod.engine import EngineDrained, EngineGone, EngineLoaded, EngineProcess
from loader.pod.follower import join_nodes
from loader.pod.heeded import (
    Announced,
    Asked,
    Event,
    Failed,
    Late,
    Prepared,
    check_engine,
    ended,
)
from loader.pod.node_group import (
    NodeEvent,
    NodeFailed,
    NodesPrepared,
    NodesServing,
    NodeStopped,
    content_digests,
)
from loader.pod.place import Place
from loader.pod.signals import Signals, StopSignal, reap_orphans
from loader.serve.vllm.arguments import sizing_arguments, written
from loader.serve.vllm.kernel_cache import KernelCache
from loader.serve.vllm.releases import RANGE, installed_versions
from loader.serve.vllm.streaming import (
    LOAD_FORMAT,
    Stream,
    ready_timeout_s,
    too_late,
    why_not_streamed,
)
from loader.status.boot_server import BootServer, listen
from loader.status.replies import bare_reply, reply
from loader.status.state import BootState
from loader.timeline import Timeline
from loader.types import ReadyModel

if TYPE_CHECKING:
    from loader.config.settings import Settings

KILL_AFTER_S = 5.0
"""Past ``drain_timeout_s`` the engine is killed."""
_FIRST_PROCESS = 1
_CONFIG = "config.json"
_NAMED = "--served-model-name"
_UNKNOWN = ReadyModel(Path("model"), (), None, Path("model"), {})  # until the files are here
_log = logging.getLogger("podloader")


class Pod:
    """Made in the main thread; answers probes from then on. A context manager: its end ends all.

    Raises:
        ConfigError: the port is taken, or what is given for vLLM names none that can be.
        EngineError: vLLM is not installed.
    """

    def __init__(self, settings: Settings, arguments: Sequence[str], timeline: Timeline) -> None:
        check_engine(settings)
        if importlib.util.find_spec("vllm") is None:
            raise EngineError("vLLM is not installed", next_step=f"install vllm{RANGE}")
        words = (*written(settings.engine_args), *arguments)
        address, place = serving_address(words), Place.read(words)
        tls = address.tls()
        self._kernels = KernelCache(settings, words, timeline)
        self._settings = settings
        self._arguments = (*arguments, *(("--headless",) if place.rank else ()))
        self._fixed = {**address.arguments(), **place.arguments()}
        self._timeline = timeline
        self._state = BootState(timeline, arrived=self._file_arrived, configured=self._hint)
        self.holds = settings.on_failure == "hold"
        """Whether a failed start is to be told until a signal comes."""
        self._serving = self._ending = self._asked = False
        self._drained = self._cut_off = False
        self._folder: Path | None = None
        self._limit: threading.Timer | None = None
        self._late: threading.Timer | None = None
        self._environment: Mapping[str, str] = {}
        self._stream: Stream | None = None
        self._ready: ReadyModel | None = None
        self._loaded = False
        self._preparing: threading.Thread | None = None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._signals = Signals(self._signalled)
        self._listening = listen(address.host, address.port)
        tell = bare_reply if address.middleware else reply
        told = (self._listening, self._state.boot, tls, address.lets_in, tell)
        self._answer = partial(BootServer, *told)
        self._server = self._answer()
        self._kernels.begin()
        self._nodes = join_nodes(place, settings.peers_token, self._node_told)
        self._failure: LoaderError | None = None  # of another node, while this one serves
        self._engine = self._start_engine()

    def __enter__(self) -> Pod:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending = True
        self._engine.close()
        self._nodes.close()
        self._server.stop()
        self._listening.close()
        if self._late is not None:
            self._late.cancel()
        if self._stream is not None:
            self._stream.close()
        self._kernels.close()
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
        except StopSignal as stop:
            self._nodes.stop(stop.number)
            raise
        except Exception as own:
            error = self._nodes.fail(own)
            self._timeline.close()
            self._state.fail(error)
            raise error from own.__cause__

    def serve(self) -> int:
        """Return the exit code, when a signal or a crash has ended the engine.

        An end that nobody has asked for is a failure, whatever the engine calls it; one that was
        asked for is none once the engine has drained, whatever hung afterwards.

        Raises:
            LoaderError: why a model that is spread over nodes has ended on all of them.
        """
        if os.getpid() == _FIRST_PROCESS:
            signal.signal(signal.SIGCHLD, lambda *_: reap_orphans(self._engine.pid))
        self._heed_nodes()  # what they told just before this one served
        code = self._engine.wait()
        if self._limit is None and self._nodes.are_many:
            raise self._nodes.fail(self._failure or ended(code))
        if (self._drained and self._cut_off) or self._nodes.follows:
            return 0
        return code if code or self._limit else EngineError.exit_code

    def hold(self) -> None:
        """Answer probes with the failure until a signal comes; the engine's memory is free."""
        self._engine.close()
        while not isinstance(self._events.get(), Asked):
            pass

    def _heed(self, event: Event) -> None:
        match event:
            case Announced(stream):
                self._stream = stream
                self._load(stream.ready, LOAD_FORMAT)
            case Prepared(ready):
                self._ready = ready
                if any(word.replace("_", "-").startswith(_NAMED) for word in self._arguments):
                    self._timeline.note(served_as=[])  # vLLM's argument wins
                self._await_nodes(ready)
            case NodesPrepared() if self._ready is not None:
                self._state.wait_for("")
                self._take(self._ready)
            case EngineLoaded(engine) if engine is self._engine:
                self._loaded = True
                if self._stream is not None and not self._stream.feed.wait_taken():
                    self._fall_back("the engine did not follow the weights")
                self._hand_over()
            case NodesServing():
                self._loaded = True
                self._hand_over()
            case EngineGone(engine) if engine is self._engine:
                self._heed_end(engine)
            case Late(engine) if engine is self._engine and not self._loaded:
                raise too_late(ready_timeout_s())
            case Failed(error) | NodeFailed(error):
                raise error
            case Asked(number) | NodeStopped(number):
                raise StopSignal(number)

    def _await_nodes(self, ready: ReadyModel) -> None:
        """Let all nodes load at one time: torch's own patience with the slowest is limited."""
        self._nodes.prepared(content_digests(ready.provenance))
        if waited_for := self._nodes.waited_for():
            self._state.wait_for(waited_for)
            self._nodes.expect(ready_timeout_s())

    def _take(self, ready: ReadyModel) -> None:
        """Let the engine have *ready*, all of which is proved."""
        if self._stream is None:
            from loader.prepare.consolidated import cache_folder

            self._load(self._kernels.lead(ready, cache_folder(self._settings)))
            self._expect_engine()
        elif why := self._stream.publish(ready):
            self._fall_back(why)
        else:
            self._expect_engine()
            self._hand_over()

    def _heed_end(self, engine: EngineProcess) -> None:
        """Start another engine over the files where the end of one is the stream's fault."""
        if self._stream is None:
            raise engine.error
        if self._stream.feed.error is not None:
            raise self._stream.feed.error
        if not (broken := self._stream.feed.wait_broken()):
            raise engine.error
        self._fall_back(broken)

    def _start_engine(self) -> EngineProcess:
        environment = self._kernels.environment
        return EngineProcess(self._listening, self._timeline, self._told, environment)

    def _load(self, ready: ReadyModel, load_format: str | None = None) -> None:
        arguments = vllm_arguments(self._settings, ready, self._arguments, load_format)
        self._engine.load(arguments, canary=self._settings.canary)

    def _fall_back(self, why: str) -> None:
        """Let another engine load from files, once they are proved; nothing is fetched again."""
        _log.warning("engine start: files, not streamed: %s", why)
        self._engine.close()
        if self._stream is not None:
            self._stream.close()
        self._state.drop_weights()
        self._stream, self._loaded = None, False
        self._engine = self._start_engine()
        self._check()
        if self._ready is not None:
            self._take(self._ready)

    def _expect_engine(self) -> None:
        """Begin to count the engine's time: all that it waited for is here."""
        if self._late is not None:
            self._late.cancel()
        if self._nodes.follows:
            return  # node 0 decides
        late = Late(self._engine)
        self._late = threading.Timer(ready_timeout_s(), self._events.put, (late,))
        self._late.daemon = True
        self._late.start()

    def _hand_over(self) -> None:
        """Let the engine serve, if it can and all of the model is proved."""
        if not self._loaded or self._ready is None:
            return
        if self._stream is not None:
            self._stream.finish()
        if self._late is not None:
            self._late.cancel()
        boot = self._state.ready()
        if not self._nodes.follows:
            self._server.stop()
            self._engine.go(boot)
            self._nodes.serving()
        self._serving = True
        serve_peers_on(self._settings)
        self._kernels.publish()

    def _check(self) -> None:
        self._engine.check(
            self._settings.engine_args,
            vllm_arguments(self._settings, _UNKNOWN, self._arguments),
            self._environment,
            self._fixed,
        )

    def _announcing(self) -> Announce | None:
        """Return what is to be told of weights on their way; None where files are waited for."""
        settings = self._settings
        start, engine_args = settings.engine_start, settings.engine_args
        nodes = "the model is over several nodes" if self._nodes.are_many else ""
        if why := nodes or why_not_streamed(start, engine_args, self._arguments):
            _log.info("engine start: files: %s", why)
            return None

        def announce(filling: FillingFolder, ready: ReadyModel) -> None:
            from loader.prepare.consolidated import cache_folder

            try:
                taken, name = self._state.take_weights, settings.served_model_name
                stream = Stream(cache_folder(settings), filling, ready, name, taken)
            except (LoaderError, OSError) as error:
                _log.warning("engine start: files, not streamed: %s", error)
                return
            _log.info("engine start: stream: the weights are loaded as they arrive")
            self._kernels.then(partial(self._events.put, Announced(stream)))

        return announce

    def _prepare(self, config: Path | None, progress: Progress) -> None:
        try:
            from loader import boot
            from loader.pod.live_adapters import live_environment

            settings = self._settings
            self._environment = live_environment(settings, config) if config else {}
            self._check()
            self._folder = settings.training.download_folder.absolute()
            if settings.base_model and not settings.base_checkpoint:
                self._hint(user_path(settings.base_model) / _CONFIG)
            self._state.pass_on(progress)
            args = settings.engine_args | sizing_arguments(self._arguments)
            ready = boot.prepare(
                replace(settings, engine_args=args),
                self._state,
                self._timeline,
                ask=self._engine.ask_unbound,
                announce=self._announcing(),
            )
            self._kernels.then(partial(self._events.put, Prepared(ready)))
        except Exception as error:
            self._events.put(Failed(error))

    def _told(self, event: EngineLoaded | EngineDrained | EngineGone) -> None:
        """Take the port back when the engine has drained: nobody is refused until the end."""
        if isinstance(event, EngineDrained):
            self._drained = True
            self._state.stop()
            self._server = self._answer()
        else:
            self._events.put(event)

    def _node_told(self, event: NodeEvent) -> None:
        self._events.put(event)
        if self._serving:
            self._heed_nodes()

    def _heed_nodes(self) -> None:
        """End with the other nodes; where this one leads, it drains first."""
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, NodeFailed):
                self._failure = event.error
                self._engine.kill()
            elif isinstance(event, NodeStopped) and self._nodes.follows:
                self._limit = self._limit or threading.Timer(0, self._engine.kill)
                self._engine.kill()
            elif isinstance(event, NodeStopped):
                self._drain(event.signal)

    def _file_arrived(self, path: str) -> None:
        if self._folder is not None and PurePosixPath(path).name == _CONFIG:
            self._hint(self._folder / path)

    def _hint(self, config: Path) -> None:
        if config.is_file():
            self._kernels.then(partial(self._engine.hint, config))

    def _signalled(self, number: int) -> None:
        """Stop the start, or let the engine drain; the second signal or the limit ends it at once.

        In the main thread, maybe in the midst of ``get``: SimpleQueue is made for that.
        """
        if self._ending or self._asked:
            self._engine.kill()
        elif not self._serving:
            self._events.put(Asked(number))
        else:
            self._asked = True
            self._drain(number)

    def _drain(self, number: int) -> None:
        """Let the engine end what it has begun, for a signal here or at another node."""
        if self._limit is not None:
            return
        limit_s = self._settings.drain_timeout_s + KILL_AFTER_S
        self._limit = threading.Timer(limit_s, self._cut)
        self._limit.daemon = True
        self._limit.start()
        if self._nodes.follows:
            self._nodes.stop(number)  # node 0's engine drains, and needs this one for it
        else:
            self._engine.signal(signal.SIGTERM)

    def _cut(self) -> None:
        self._cut_off = True
        _log.warning("the engine did not end in time, and is killed")
        self._engine.kill()


def vllm_arguments(
    settings: Settings, ready: ReadyModel, given: Sequence[str], load_format: str | None = None
) -> tuple[str, ...]:
    """Return what ``vllm serve`` would be given; *given* stands last and wins."""
    from loader.serve.vllm.arguments import pod_arguments

    return pod_arguments(
        ready,
        settings.engine_args,
        given,
        drain_timeout_s=settings.drain_timeout_s,
        served_model_name=settings.served_model_name,
        trust_remote_code=settings.trust_remote_code,
        load_format=load_format,
    )
