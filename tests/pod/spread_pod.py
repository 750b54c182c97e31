"""``podloader`` whose engine loads nothing: ``python -m tests.pod.spread_pod serve CONFIG …``.

Run as a module with two numbers it is that engine's process. ``FAILS``: why nothing is prepared;
``CRASHES``: the engine ends by itself while it loads.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from loader.serve.vllm.channel import Channel


def _work() -> int:
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))

    def end(*_: Any) -> None:
        channel.send("drained")
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    while message := channel.receive():
        if message["kind"] == "load":
            if os.environ.get("CRASHES"):
                return 3
            if "--headless" not in message["arguments"]:
                channel.send("loaded")
    return 0


def _serve() -> None:
    from loader import boot
    from loader.cli import main
    from loader.errors import FetchError
    from loader.pod import engine
    from loader.types import ReadyModel

    def prepare(*_: Any, **__: Any) -> ReadyModel:
        if why := os.environ.get("FAILS"):
            raise FetchError(why, where="s3://bucket/key")
        return ReadyModel(Path("/m"), (), None, Path("/m"), {"files": {"a": os.environ["FILE"]}})

    boot.prepare = prepare
    engine._WORKER = "tests.pod.spread_pod"
    main()


if __name__ == "__main__":
    if sys.argv[1].isdecimal():
        sys.exit(_work())
    _serve()
