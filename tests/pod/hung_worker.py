"""An engine's process that loads nothing and never ends; after SIGTERM it has drained, or has not.

``HUNG=drained`` or ``HUNG=busy``; it takes the place of ``loader.serve.vllm.worker``.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Any

from loader.serve.vllm.channel import Channel


def _run() -> None:
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))

    def drain(*_: Any) -> None:
        if os.environ["HUNG"] == "drained":
            channel.send("drained")

    signal.signal(signal.SIGTERM, drain)
    while message := channel.receive():
        if message["kind"] == "load":
            channel.send("loaded")
    signal.pause()


if __name__ == "__main__":
    _run()
