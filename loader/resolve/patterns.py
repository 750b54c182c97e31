"""The pattern rules: ``*`` any run of characters, ``?`` exactly one, the rest literal.

``*`` crosses ``/`` and a pattern that ends in ``/`` takes everything under it, as the platform's
document says ("Wildcards * match to an arbitrary number of chars while ? matches to one").
"""

from __future__ import annotations


def match_pattern(pattern: str, name: str) -> bool:
    """Return whether *name* matches; never worse than ``len(pattern) * len(name)`` steps."""
    if pattern.endswith("/"):
        pattern += "*"
    p = n = 0
    star, mark = -1, 0
    while n < len(name):
        if p < len(pattern) and pattern[p] == "*":
            star, mark = p, n
            p += 1
        elif p < len(pattern) and (pattern[p] == "?" or pattern[p] == name[n]):
            p += 1
            n += 1
        elif star >= 0:
            # Back to the last star only: an earlier one can never do better.
            mark += 1
            p, n = star + 1, mark
        else:
            return False
    return all(c == "*" for c in pattern[p:])


def match_pathwise(pattern: str, name: str) -> bool:
    """Return whether *name* matches when ``*`` and ``?`` stop at ``/``, as a shell reads it."""
    parts, names = pattern.split("/"), name.split("/")
    if pattern.endswith("/"):
        parts.pop()
        if len(names) <= len(parts):
            return False
        names = names[: len(parts)]
    return len(parts) == len(names) and all(
        match_pattern(p, n) if p else not n for p, n in zip(parts, names, strict=True)
    )


def literal_prefix(pattern: str) -> str:
    """Return the part of *pattern* before its first wildcard."""
    cut = min((i for i in (pattern.find("*"), pattern.find("?")) if i >= 0), default=len(pattern))
    return pattern[:cut]
