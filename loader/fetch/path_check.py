"""Whether anything lies where a fetch is going to write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from loader.errors import ResolveError
from loader.fetch.files import KINDS, STATE, disk_errors
from loader.fetch.folders import Folders
from loader.types import Artifact


def check_way(root: Path, artifacts: Sequence[Artifact]) -> None:
    """Look below *root* at every place that is going to be written.

    Each folder that there is is read once: a checkpoint may have many thousand files.

    Raises:
        ResolveError: symlinks, files in a folder's place, folders, devices and FIFOs in a file's
            place; all of them.
    """
    if not artifacts:
        return
    wanted = _wanted_entries(artifacts)
    links: list[str] = []
    files: list[str] = []
    folders: list[str] = []
    others: list[str] = []
    left = [""]
    while left:
        folder = left.pop()
        for entry in _entries(root / folder):
            is_folder = wanted[folder].get(entry.name)
            if is_folder is None:
                continue
            if entry.is_symlink():
                links.append(entry.path)
            elif entry.is_dir():
                (left if is_folder else folders).append(f"{folder}/{entry.name}".lstrip("/"))
            elif is_folder:
                files.append(entry.path)
            elif not entry.is_file():
                others.append(entry.path)
    problems = [f"{path}: a symlink" for path in sorted(links)]
    problems += [f"{path}: a file, where a folder is needed" for path in sorted(files)]
    problems += [f"{root / p}: a folder, where a file is needed" for p in sorted(folders)]
    problems += [f"{path}: a device, a FIFO or a socket" for path in sorted(others)]
    if problems:
        raise ResolveError(
            "something lies in the way below the download folder",
            where=str(root),
            problems=problems,
            next_step="remove it, or use an empty download_folder",
        )


def check_still(folders: Folders) -> None:
    """Raise ResolveError where a folder with fetched files was exchanged since it was opened."""
    moved = [path for path in folders.moved() if path.partition("/")[0] != STATE]
    if moved:
        raise ResolveError(
            "folders of the download were exchanged while it ran",
            where=folders.root,
            problems=moved,
            next_step="let nobody else write to the download folder, and run again",
        )


def _wanted_entries(artifacts: Sequence[Artifact]) -> dict[str, dict[str, bool]]:
    """Return the names that have to be free, by their folder below the root, ``""`` for itself.

    With each name: whether it is a folder's.
    """
    wanted: dict[str, dict[str, bool]] = {"": {STATE: True}}
    for artifact in artifacts:
        folder, _, name = artifact.path.rpartition("/")
        _folder(wanted, folder)[name] = False
        state = _folder(wanted, f"{STATE}/files/{folder}")
        for kind in KINDS:
            state[f"{name}.{kind}"] = False
    return wanted


def _folder(wanted: dict[str, dict[str, bool]], folder: str) -> dict[str, bool]:
    """Return the names in *folder*, which becomes one of its parent's."""
    entries = wanted.get(folder)
    if entries is None:
        entries = wanted[folder] = {}
        while folder:
            parent, _, name = folder.rpartition("/")
            known = parent in wanted
            wanted.setdefault(parent, {})[name] = True
            if known:
                break
            folder = parent
    return entries


def _entries(folder: Path) -> Sequence[os.DirEntry[str]]:
    with disk_errors(folder):
        try:
            with os.scandir(folder) as found:
                return tuple(found)
        except (FileNotFoundError, NotADirectoryError):  # a file: writing below it will say so
            return ()
