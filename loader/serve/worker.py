"""The engine's process: imports vLLM while the checkpoints arrive, then is its OpenAI server.

``python -m loader.serve.worker CHANNEL_FD LISTENING_FD``, started by ``loader.pod``. A process of
its own, because imports hold the interpreter's lock: in a thread they would slow the download, and
the download them. What it is told and tells, in this order:

    imports          begin, end        "engine import"
    <- check         engine_args, arguments without the model: refused while the download runs
    <- load          arguments
    engine           begin, end        "engine load", "warm-up", "first token"
    -> loaded
    <- go            boot: what /status shows from now on
    serves on LISTENING_FD until a signal or the engine's end
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from loader.errors import EngineError, LoaderError
from loader.serve.channel import Channel

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_UNEXPECTED = 1


class Stages:
    """Tells the pod of stages as they begin and end."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Tell the beginning and the end of the block."""
        self._channel.send("begin", name=name, at=time.monotonic())
        failed = ""
        try:
            yield
        except BaseException as error:
            failed = type(error).__name__
            raise
        finally:
            self._channel.send("end", name=name, at=time.monotonic(), failed=failed)


def main(channel_fd: int, listening_fd: int) -> int:
    """Do it all and return the process's exit code."""
    channel = Channel(socket.socket(fileno=channel_fd))
    listening = socket.socket(fileno=listening_fd)
    signal.signal(signal.SIGTERM, _interrupt)
    _end_with_parent()
    stages = Stages(channel)
    try:
        with stages.stage("engine import"):
            _import_vllm()
        return _serve(channel, listening, stages)
    except LoaderError as error:
        channel.send("failed", error=error.to_json())
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGTERM
    except Exception as error:
        channel.send("failed", error=EngineError(f"{type(error).__name__}: {error}").to_json())
        raise


def _serve(channel: Channel, listening: socket.socket, stages: Stages) -> int:
    from loader.serve.arguments import check_engine_args, parse_arguments

    check = channel.receive()
    if check is None:
        return _UNEXPECTED  # the pod is gone
    check_engine_args(check["engine_args"])
    parse_arguments(check["arguments"])
    load = channel.receive()
    if load is None:
        return _UNEXPECTED
    from loader.serve.server import serve_openai

    return serve_openai(parse_arguments(load["arguments"]), listening, channel, stages.stage)


def _import_vllm() -> None:
    """Import all that the server and the engine's processes need.

    Raises:
        EngineError: vLLM is not there or cannot be imported.
    """
    from loader.serve.failures import import_failure

    try:
        import loader.serve.server

        loader.serve.server.import_engine()
    except ImportError as error:
        raise import_failure(error) from error


def _interrupt(*_: object) -> NoReturn:
    """End what runs before vLLM's server has handlers of its own."""
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the pod's process is gone, however it went."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
