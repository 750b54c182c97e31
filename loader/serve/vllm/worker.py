"""The engine's process: imports vLLM while the checkpoints arrive, then is its OpenAI server.

``python -m loader.serve.vllm.worker CHANNEL_FD LISTENING_FD``, started by ``loader.pod``. A process
of its own, though a thread would not slow the download more (``benchmarks/imports.py``): its crash
leaves the pod an exit code to give, and it has no threads of a download or a merge, so that the
engine's processes may be forks of it. What it is told and tells, in this order:

    imports          begin, end        "engine import"
    <- check         engine_args, arguments without the model: refused while the download runs;
                     environment; address: the arguments that the pod serves the port by
    <- hint          config: the model's config.json, as soon as it is here
    inspection       begin, end        "model class"
    <- ask           model, adapters: the names of their tensors
    -> unbound       found: why vLLM would not use all of an adapter, by its name
    <- load          arguments, canary
    engine           begin, end        "engine load", "warm-up", "first token", "canary"
    -> loaded
    <- go            boot: what /status shows from now on
    serves on LISTENING_FD until a signal or the engine's end
    -> drained       after a signal: the port is the pod's again
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from loader.errors import EngineError, LoaderError
from loader.json_text import parse_json
from loader.log_lines import set_up_logging
from loader.parent import end_with_parent
from loader.serve.vllm.channel import Channel

_UNEXPECTED = 1
_END_S = 5.0  # from SIGTERM


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


def main(channel_fd: int, listening_fd: int, logging_chosen: str) -> int:
    """Do it all and return the process's exit code; *logging_chosen* is how the pod logs."""
    set_up_logging(**parse_json(logging_chosen))
    channel = Channel(socket.socket(fileno=channel_fd))
    listening = socket.socket(fileno=listening_fd)
    end_with_parent(signal.SIGTERM)
    stages = Stages(channel)
    try:
        with stages.stage("engine import"):
            _import_vllm()  # SIGTERM ends it as it is: modules pass over what is raised in them
        signal.signal(signal.SIGTERM, _interrupt)
        return _serve(channel, listening, stages)
    except LoaderError as error:
        _tell_failure(channel, error)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGTERM
    except Exception as error:
        _tell_failure(channel, EngineError(f"{type(error).__name__}: {error}"))
        raise


def _serve(channel: Channel, listening: socket.socket, stages: Stages) -> int:
    from loader.serve.vllm.arguments import check_engine_args, parse_arguments

    check = channel.receive()
    if check is None:
        return _UNEXPECTED  # the pod is gone
    os.environ.update(check["environment"])  # before vLLM loads its plugins
    check_engine_args(check["engine_args"])
    from loader.serve.vllm.bound import ask_unbound
    from loader.serve.vllm.openai_server import check_mode, inspect_model, serve_openai

    check_mode(parse_arguments(check["arguments"]), check["address"])

    while (load := channel.receive()) and load["kind"] != "load":
        if load["kind"] == "ask":
            model, adapters = Path(load["model"]), load["adapters"]
            channel.send("unbound", found=ask_unbound(model, check["engine_args"], adapters))
            continue
        with stages.stage("model class"):
            inspect_model(Path(load["config"]))
    if load is None:
        return _UNEXPECTED
    args = parse_arguments(load["arguments"])
    return serve_openai(args, listening, channel, stages.stage, canary=load["canary"])


def _import_vllm() -> None:
    """Import all that the server and the engine's processes need.

    Raises:
        EngineError: vLLM is not there or cannot be imported.
    """
    from loader.serve.vllm.caches import warn_unwritable_cache
    from loader.serve.vllm.failures import import_failure
    from loader.serve.vllm.releases import warn_unproved

    try:
        import loader.serve.vllm.openai_server

        loader.serve.vllm.openai_server.import_engine()
    except ImportError as error:
        raise import_failure(error) from error
    warn_unproved()
    warn_unwritable_cache()


def _tell_failure(channel: Channel, error: LoaderError) -> None:
    """Tell the pod, which will send SIGTERM: this process ends by itself, and has ended by then.

    An interrupt in the midst of the interpreter's own end could only be shown and ignored.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel.send("failed", error=error.to_json())


def _interrupt(*_: object) -> NoReturn:
    """End what runs before vLLM's server has handlers of its own.

    Some library may pass over it; then this process ends with all that it has started.
    """
    limit = threading.Timer(_END_S, os.killpg, (0, signal.SIGKILL))
    limit.daemon = True
    limit.start()
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
