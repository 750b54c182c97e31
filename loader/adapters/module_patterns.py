"""Regular expressions of an adapter's config, which are Python's, matched in bounded time.

One may take longer than the universe on a name of forty letters, and nothing ends Python's matcher
in its own process. What cannot take long is matched here; the rest in a process beside this one.
"""

from __future__ import annotations

import atexit
import json
import re
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache

from loader.errors import AdapterError
from loader.units import show_seconds

_LIMIT_S = 2.0
_LONGEST = 2000
# Letters and dots, and at most one thing that repeats: quadratic at worst.
_PLAIN = re.compile(
    r"\^?(?:[\w/-]|\\?\.)*(?:(?:\\d|\\?\.|\[[\w-]+\])[+*]?(?:[\w/-]|\\?\.)*)?\$?", re.ASCII
)
_MATCHER = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
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
        re.compile(_suffix(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        return f"no regular expression: {error}"
    return None


def matches_suffix(pattern: str, module: str) -> bool:
    """Return whether *pattern* matches *module*, or what follows one of its dots.

    Raises:
        AdapterError: that cannot be told in a short time.
    """
    if _PLAIN.fullmatch(pattern):
        return re.match(_suffix(pattern), module) is not None
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


class _Matcher:
    """The process that matches, started when it is first asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, pattern: str, names: Sequence[str]) -> bytes | None:
        """Return a digit for each of *names*, None where it says nothing in time."""
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _MATCHER],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([pattern, list(names)]).encode() + b"\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], _LIMIT_S)[0]:
                return process.stdout.readline().rstrip()
            self._stop(process)
            return None

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
    found = _matcher.ask(pattern, names)
    if found is None:
        raise AdapterError(
            "a pattern of the adapter's config that takes too long to match",
            where=pattern[:200],
            expected=f"an answer for {len(names)} modules within {show_seconds(_LIMIT_S)}",
            next_step="write the modules' names into adapter_config.json instead of the pattern",
        )
    return found
