"""The engine's process as the pod sees it: started early, told what to serve, waited for."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from loader.errors import EngineError, LoaderError, error_from_json
from loader.log_lines import logging_chosen
from loader.serve.vllm.bound import Names, Reason, read_reasons
from loader.serve.vllm.channel import Channel
from loader.serve.vllm.streaming import stream_environment
from loader.status.state import Boot
from loader.timeline import Open, Timeline

_LANE = "engine"
_WORKER = "loader.serve.vllm.worker"
_END_S, _STOP_S = 5.0, 1.0


@dataclass(frozen=True, slots=True)
class EngineLoaded:
    """The engine could serve."""

    engine: EngineProcess


@dataclass(frozen=True, slots=True)
class EngineGone:
    """The process has failed or ended before it served."""

    engine: EngineProcess


@dataclass(frozen=True, slots=True)
class EngineDrained:
    """The process has answered all that it will, and accepts no more."""


class EngineProcess:
    """``loader.serve.vllm.worker`` and the channel to it. Its imports begin at once.

    *tell* is called from another thread. *environment*: variables beside the pod's own.
    """

    def __init__(
        self,
        listening: socket.socket,
        timeline: Timeline,
        tell: Callable[[EngineLoaded | EngineDrained | EngineGone], None],
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        ours, theirs = socket.socketpair()
        self._timeline = timeline
        self._tell = tell
        self._error: LoaderError | None = None
        self._loading = self._serving = False
        self._unbound: queue.SimpleQueue[dict[str, Reason]] = queue.SimpleQueue()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    _WORKER,
                    *map(str, (theirs.fileno(), listening.fileno())),
                    logging_chosen(),
                ],
                pass_fds=(theirs.fileno(), listening.fileno()),
                stdin=subprocess.DEVNULL,
                env={**os.environ, **stream_environment(), **environment},
                # A Ctrl-C at the terminal is for the pod alone, which passes it on; and the group
                # is what ``kill`` ends.
                start_new_session=True,
            )
        self._channel = Channel(ours)
        self._listener = threading.Thread(target=self._listen, name="engine", daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def error(self) -> LoaderError:
        """Why there is no engine."""
        if self._error is not None:
            return self._error
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        code = self._process.returncode
        return EngineError(
            "the engine's process ended while it started",
            got=f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name,
            next_step="its own log lines above name the cause",
        )

    def check(
        self,
        engine_args: Mapping[str, object],
        arguments: Sequence[str],
        environment: Mapping[str, str],
        address: Mapping[str, object],
    ) -> None:
        """Let the process refuse arguments as soon as it can, and set variables for vLLM.

        *address* holds those by which the port is served until then; vLLM's must be the same.
        """
        self._channel.send(
            "check",
            engine_args=dict(engine_args),
            arguments=list(arguments),
            environment=dict(environment),
            address=dict(address),
        )

    def hint(self, config: Path) -> None:
        """Let the process look at the model's *config*, which is here before the weights."""
        if not self._loading:
            self._channel.send("hint", config=str(config))

    def ask_unbound(self, model: Path, adapters: Names) -> Mapping[str, Reason]:
        """Return why vLLM would not use all of an adapter, by its name, once it can say.

        Empty, too, where the process is gone, which ``tell`` is told of.
        """
        shown = {name: list(tensors) for name, tensors in adapters.items()}
        self._channel.send("ask", model=str(model), adapters=shown)
        return self._unbound.get()

    def load(self, arguments: Sequence[str], *, canary: bool) -> None:
        """Begin to load the model that *arguments* name; with *canary*, its adapters are proved."""
        self._loading = True
        self._channel.send("load", arguments=list(arguments), canary=canary)

    def go(self, boot: Boot) -> None:
        """Let the process accept connections; *boot* is what its ``/status`` shows."""
        self._serving = True
        self._channel.send("go", boot=boot.to_json())

    def wait(self) -> int:
        """Return the exit code, 128 and the number after a signal, when the process is over."""
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def signal(self, number: int) -> None:
        """Pass a signal on."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """End the process and all that it started, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process if it still runs; one without an engine yet has nothing to tidy up.

        vLLM may take its time where it loads, and has nothing to lose there.
        """
        self._serving = True  # its end is no failure any more
        if self._loading and self._process.poll() is None:
            self.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        self.kill()
        self._process.wait()
        self._listener.join(_STOP_S)
        self._channel.close()

    def _listen(self) -> None:
        begun: dict[str, Open] = {}
        while message := self._channel.receive():
            kind = message["kind"]
            if kind == "begin":
                at, name = message["at"], message["name"]
                begun[name] = self._timeline.begin(name, lane=_LANE, at=at)
            elif kind == "end":
                span = begun.pop(message["name"])
                self._timeline.end(span, at=message["at"], failed=message["failed"])
            elif kind == "unbound":
                self._unbound.put(read_reasons(message["found"]))
            elif kind == "loaded":
                self._tell(EngineLoaded(self))
            elif kind == "drained":
                self._tell(EngineDrained())
            elif kind == "failed":
                self._error = error_from_json(message["error"])
                break
        self._unbound.put({})
        for span in begun.values():
            self._timeline.end(span, failed="ended")
        if not self._serving:
            self._tell(EngineGone(self))
