"""Files that bear the names of modules, and tell when one of them is run."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

_LEFT_ALONE = {"__main__", "antigravity", "this"}


def module_names() -> set[str]:
    """Return every name that an import here might ask for: the standard library's, packages'."""
    names = {*sys.stdlib_module_names, *filter(str.isidentifier, packages_distributions())}
    return (names | {"loader"}) - _LEFT_ALONE


def plant(folder: Path, names: Iterable[str]) -> None:
    """Put a module of each name into *folder*."""
    for name in names:
        text = f"open({str(folder / '_run.txt')!r}, 'a').write({name!r} + chr(10))\n"
        (folder / f"{name}.py").write_text(
            text + "raise SystemExit('a file of the user was run')\n"
        )


def planted_and_run(folder: Path) -> list[str]:
    """Return the names of those that were run."""
    path = folder / "_run.txt"
    return path.read_text().split() if path.exists() else []
