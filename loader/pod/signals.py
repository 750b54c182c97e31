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
    """Raises ``StopSignal`` in the main thread, or once ``pass_to`` was called, passes signals on.

    Made in the main thread; ``restore`` puts back what was there before.
    """

    def __init__(self) -> None:
        self._receiver: Callable[[int], None] | None = None
        self._before = {number: signal.signal(number, self._handle) for number in _STOPPING}

    def pass_to(self, receiver: Callable[[int], None]) -> None:
        """Raise no more: hand the signals to *receiver*, in the main thread."""
        self._receiver = receiver

    def restore(self) -> None:
        """Handle no more signals."""
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
