"""No engine process outlives the process that started it.

A server that ends by a signal runs no exit handlers (uvicorn raises SIGTERM again once it has shut
down, Truss's server with it), and vLLM's engine core does not notice that its parent is gone: it
would keep the GPU's memory. So a small process waits for the end of this one, however that comes.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys

_GRACE_S = 5
# Its standard input ends when the last writer does: this process, or close() below.
_SCRIPT = f"""
import os, signal, sys, time

def send(number, pids):
    left = []
    for pid in pids:
        try:
            os.kill(pid, number)
            left.append(pid)
        except ProcessLookupError:
            pass
    return left

sys.stdin.buffer.read()
left = send(signal.SIGTERM, map(int, sys.argv[1:]))
ends = time.monotonic() + {_GRACE_S}
while left and time.monotonic() < ends:
    time.sleep(0.1)
    left = send(0, left)
send(signal.SIGKILL, left)
"""


class OrphanGuard:
    """Ends child processes of a name when this process is gone."""

    def __init__(self, prefix: str) -> None:
        """Guard the ``multiprocessing`` children whose names begin with *prefix*."""
        children = multiprocessing.active_children()
        pids = [str(child.pid) for child in children if child.name.startswith(prefix)]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _SCRIPT, *pids],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C at the terminal is not for it
        )

    def close(self) -> None:
        """Guard no more: the children have ended in order."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
