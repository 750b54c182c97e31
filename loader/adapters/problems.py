"""Several checks whose failures are told in one error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from loader.errors import AdapterError, FormatError

_Found = TypeVar("_Found")


def run_all(checks: Iterable[Callable[[], _Found]]) -> list[_Found]:
    """Return what all *checks* return.

    Raises:
        AdapterError: of the one that failed; of several, one error with the problems of all.
        FormatError: the one that failed.
    """
    found: list[_Found] = []
    failed: list[AdapterError | FormatError] = []
    for check in checks:
        try:
            found.append(check())
        except (AdapterError, FormatError) as error:
            failed.append(error)
    if len(failed) == 1:
        raise failed[0]
    if failed:
        first, *others = failed
        same = all(error.where == first.where for error in others)
        problems = [
            f"{'' if same else f'{error.where}: '}{problem}"
            for error in failed
            for problem in error.problems or (_sum_up(error),)
        ]
        raise AdapterError(
            "; ".join(dict.fromkeys(error.what for error in failed)),
            where=first.where if same else "",
            expected="; ".join(dict.fromkeys(e.expected for e in failed if e.expected)),
            problems=list(dict.fromkeys(problems)),
            next_step=first.next_step,
        )
    return found


def _sum_up(error: AdapterError | FormatError) -> str:
    return f"{error.what}: {error.got}" if error.got else error.what
