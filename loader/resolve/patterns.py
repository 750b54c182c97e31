"""The pattern rules: ``*`` any run of characters, ``?`` exactly one, the rest literal.

``*`` crosses ``/`` and a pattern that ends in ``/`` takes everything under it, as the platform's
document says ("Wildcards * match to an arbitrary number of chars while ? matches to one").
"""

from __future__ import annotations

import re
from collections.abc import Callable


def match_pattern(pattern: str, name: str) -> bool:
    """Return whether *name* matches; never worse than ``len(pattern) * len(name)`` steps."""
    return compile_pattern(pattern)(name)


def compile_pattern(pattern: str) -> Callable[[str], bool]:
    """Return the function that tells whether a name matches *pattern*."""
    if pattern.endswith("/"):
        pattern += "*"
    head, *rest = [_Run(text) for text in pattern.split("*")]
    if not rest:
        return lambda name: len(name) == head.length and head.at(name, 0)
    *middle, tail = rest

    def match(name: str) -> bool:
        # Leftmost is enough: no run can do better by starting later.
        last = len(name) - tail.length
        if last < head.length or not head.at(name, 0) or not tail.at(name, last):
            return False
        place = head.length
        for run in middle:
            found = run.find(name, place, last)
            if found < 0:
                return False
            place = found + run.length
        return True

    return match


def compile_pathwise(pattern: str) -> Callable[[str], bool]:
    """Return the function that reads *pattern* as a shell would."""
    parts = pattern.split("/")
    folder = pattern.endswith("/")
    if folder:
        parts.pop()
    matchers = [compile_pattern(part) for part in parts]

    def match(name: str) -> bool:
        names = name.split("/")
        if folder and len(names) > len(matchers):
            names = names[: len(matchers)]
        elif folder or len(names) != len(matchers):
            return False
        return all(match(name) for match, name in zip(matchers, names, strict=True))

    return match


class _Run:
    """A piece of a pattern without ``*``: literal characters, and ``?`` for any one."""

    def __init__(self, text: str) -> None:
        self.length = len(text)
        self._text = text
        dots = "".join("." if c == "?" else re.escape(c) for c in text)
        self._regex = re.compile(dots, re.DOTALL) if "?" in text else None

    def at(self, name: str, place: int) -> bool:
        if self._regex is not None:
            return self._regex.match(name, place) is not None
        return name.startswith(self._text, place)

    def find(self, name: str, start: int, end: int) -> int:
        """Return the leftmost place in ``name[start:end]``, or -1."""
        if self._regex is None:
            return name.find(self._text, start, end)
        found = self._regex.search(name, start, end)
        return found.start() if found else -1
