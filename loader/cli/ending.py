"""The end of the process."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator

from loader.cli import INTERRUPTED

_BROKEN_PIPE = 128 + 13  # as a shell tells of a process that SIGPIPE ended


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Let the process end when Python has done its part, by the exit code of the block.

    A fetch that fails, or is told to stop, waits for none of its threads. One that is in OpenSSL
    then crashes the process where libc's ``exit`` takes OpenSSL's tables down under it.
    """
    code = 1

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # closed, or nobody reads it any more
                stream.flush()
        os._exit(code)

    atexit.register(leave)  # before all others, so that it is called behind them
    try:
        yield
        code = 0
    except BrokenPipeError:  # who reads standard output has seen enough
        code = _BROKEN_PIPE
        raise SystemExit(code) from None
    except KeyboardInterrupt:  # before there was a command
        code = INTERRUPTED
        raise SystemExit(code) from None
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
        raise
