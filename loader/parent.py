"""A process that is of no use without the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(by: signal.Signals) -> None:
    """Ask the kernel to send *by* here when the thread that started this process is gone.

    However it went; on Linux alone, elsewhere nothing is asked for.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        # SAFETY: prctl(2) reads two integers here and writes nothing; a kernel without this option
        # answers with an error and changes nothing.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(by))
        if os.getppid() != parent:  # it went before
            os.kill(os.getpid(), by)
