"""SIGTERM and SIGINT, right for a process that may be PID 1: one without handlers ignores both."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType

_STOPPING = (signal.SIGTERM, signal.SIGINT)


class StopSignal(BaseException):
    """The orchestrator or the user asks for the end, before there is anything to drain."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)

    @property
    def exit_code(self) -> int:
        """As a shell tells of a process that the signal ended."""
        return 128 + self.number


class Signals:
    """Gives signals to *receiver*, in the main thread; without one it raises ``StopSignal`` there.

    Made in the main thread. A long-lived process has a receiver: an exception in the midst of
    somebody's import may be swallowed by it, or leave it broken.
    """

    def __init__(self, receiver: Callable[[int], None] | None = None) -> None:
        self._receiver = receiver
        self._before = {number: signal.signal(number, self._handle) for number in _STOPPING}

    def restore(self) -> None:
        """Put back what was there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._receiver is None:
            raise StopSignal(number)
        self._receiver(number)


def reap_orphans(own: int) -> None:
    """Take the exit codes of processes that became ours when their parents ended.

    PID 1 inherits every orphan of its container; without this they stay as zombies. *own* is the
    child whose exit code somebody else waits for.
    """
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid == own:
                return
            os.waitpid(found.si_pid, os.WNOHANG)
