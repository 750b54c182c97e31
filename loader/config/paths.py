"""What a relative path of a config is relative to: the folder that holds the config."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

_NO_PATH = re.compile(r"[a-z][a-z0-9+.-]*:|(baseten|local)$", re.IGNORECASE)
_ONE_SLASH = re.compile(r"([a-z][a-z0-9+.-]*:)/(?!/)", re.IGNORECASE)
_TOLD = 8  # names
_log = logging.getLogger("podloader")


def place_path(text: str, folders: Sequence[Path], name: str, *, may_be_id: bool = False) -> str:
    """Return *text*, the value of *name*, as an absolute path; URLs and sources' names as they are.

    *folders*: of the config, and of the file that it is a symlink to. A path that exists below the
    working folder alone is still taken, with a warning. *may_be_id*: what does not exist is a
    Hugging Face id, unless it begins with a dot.
    """
    path = Path(text)
    if not text or _NO_PATH.match(text) or path.is_absolute() or text.startswith("~"):
        return text
    own = [(folder / path).absolute() for folder in folders]
    for place in own:
        if place.exists():
            return str(place)
    if path.exists():
        _log.warning(
            "%s: %s is not in %s, the config's folder, but in the working folder, from which it is "
            "taken for now; write it relative to the config",
            name,
            text,
            folders[0].absolute(),
        )
        return str(path.absolute())
    return text if may_be_id and not text.startswith(".") else str(own[0])


def tell_names(folder: Path) -> str:
    """Return what lies in *folder*, as far as it can be told in a line, but for hidden names."""
    try:
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return ""
    return ", ".join(names[:_TOLD]) + (", …" if len(names) > _TOLD else "")


def suggest_path(path: Path | str, otherwise: str) -> str:
    """Return what to do about a *path* that is not there: the nearest that is, else *otherwise*."""
    import difflib  # only mistakes need it

    if match := _ONE_SLASH.match(str(path)):
        return f"a URL has two slashes: {match[1]}//{str(path)[match.end() :]}"
    absolute = Path(path).absolute()
    try:
        names = [entry.name for entry in absolute.parent.iterdir()]
    except OSError:
        above = next((f for f in absolute.parents if f.is_dir()), absolute.parent)
        return f"there is no folder {absolute.parent}; {above} is the last of it that is there"
    if near := difflib.get_close_matches(absolute.name, names, n=1):
        return f"did you mean {Path(path).parent / near[0]}?"
    return otherwise
