"""Regular expressions of an adapter's config, which are Python's, matched in bounded time.

One may take longer than the universe on a name of forty letters, and nothing ends Python's matcher
in its own process. What cannot take long is matched here; the rest in a process beside this one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import lru_cache

from loader.errors import AdapterError
from loader.units import show_seconds

_LIMIT_S = 2.0
_LIMIT_CPU_S = 60  # of one process, for all that it is asked
_SLOW_S = 0.05
_LIMIT_ALL_S = 60.0  # for all that is slow, of which time makes up for a share
_FORGIVEN = 0.1
_LONGEST = 2000
# Letters and dots, and at most one thing that repeats: quadratic at worst.
_PLAIN = re.compile(
    r"\^?(?:[\w/-]|\\?\.)*(?:(?:\\d|\\?\.|\[[\w-]+\])[+*]?(?:[\w/-]|\\?\.)*)?\$?", re.ASCII
)
_MATCHER = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (limit := int(sys.argv[1]), limit))
for line in sys.stdin:
    pattern, names = json.loads(line)
    print(*[int(re.match(pattern, name) is not None) for name in names], sep="", flush=True)
"""


def pattern_problem(pattern: object) -> str | None:
    """Return what is wrong with a key of ``rank_pattern``, as PEFT puts it together; None: nothing.

    Source: peft ``utils/other.py``, ``get_pattern_key``.
    """
    if not isinstance(pattern, str) or len(pattern) > _LONGEST:
        return f"no text of at most {_LONGEST} characters"
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"no regular expression: {error}"
    return None


def matches_suffix(pattern: str, module: str) -> bool:
    """Return whether *pattern* matches *module*, or what follows one of its dots.

    Raises:
        AdapterError: that cannot be told in a short time.
    """
    if _PLAIN.fullmatch(pattern):
        return _compiled(pattern).match(module) is not None
    return _ask_once(_suffix(pattern), module)


def check_suffix(pattern: str, modules: Sequence[str]) -> None:
    """Raise AdapterError where ``matches_suffix`` would for one of *modules*."""
    if not _PLAIN.fullmatch(pattern):
        _ask(_suffix(pattern), modules)


def check_whole(pattern: str, modules: Sequence[str]) -> None:
    """Raise AdapterError where matching *pattern* with all of a module's name has no quick end."""
    if problem := pattern_problem(pattern):
        raise AdapterError("a pattern that PEFT refuses", where=pattern[:200], got=problem)
    if not _PLAIN.fullmatch(pattern):
        _ask(rf"(?:{pattern})\Z", modules)


def _suffix(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


@lru_cache(1 << 15)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(_suffix(pattern))


class _Matcher:
    """The process that matches, started when it is first asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._slow_s, self._asked_at = 0.0, 0.0

    def ask(self, pattern: str, names: Sequence[str]) -> bytes | None:
        """Return a digit for each of *names*, None where it says nothing in time."""
        with self._lock:
            began = time.monotonic()
            self._slow_s = max(0.0, self._slow_s - _FORGIVEN * (began - self._asked_at))
            self._asked_at = began
            if self._slow_s > _LIMIT_ALL_S:
                return None
            try:
                found = self._ask(pattern, names)
                if found == b"":  # it ended: by its own limit where it had matched much before
                    found = self._ask(pattern, names)
            finally:
                took_s = time.monotonic() - began
                self._slow_s += took_s if took_s > _SLOW_S else 0.0
            return found or None

    def _ask(self, pattern: str, names: Sequence[str]) -> bytes | None:
        """Do so once; nothing where the process ended instead."""
        with contextlib.suppress(BrokenPipeError):
            process = self._process
            if process is None or process.poll() is not None:
                process = self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _MATCHER, str(_LIMIT_CPU_S)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([pattern, list(names)]).encode() + b"\n")
            process.stdin.flush()
            in_time = select.select([process.stdout], [], [], _LIMIT_S)[0]
            found = process.stdout.readline().rstrip() if in_time else b""
            if len(found) == len(names):
                return found
            self._stop(process)
            return b"" if in_time else None
        return b""

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._process is not None:
                self._stop(self._process)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        self._process = None
        process.kill()
        process.communicate()


_matcher = _Matcher()
atexit.register(_matcher.close)


@lru_cache(1 << 16)
def _ask_once(pattern: str, name: str) -> bool:
    return _ask(pattern, [name]) == b"1"


def _ask(pattern: str, names: Sequence[str]) -> bytes:
    found = _matcher.ask(pattern, names) if names else b""
    if found is None:
        raise AdapterError(
            "a pattern of the adapter's config that takes too long to match",
            where=pattern[:200],
            expected=f"an answer for {len(names)} modules within {show_seconds(_LIMIT_S)}",
            next_step="write the modules' names into adapter_config.json instead of the pattern",
        )
    return found
