"""Which files a config asked for, once all of them are here: for a start without its origin.

::

    <download_folder>/.podloader/completed/<key>     {"files": [[job, rank, name, source, bytes] …]}

It holds no signature, and proves nothing: each file has its own record.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from loader.fetch.files import (
    DAMAGED,
    STATE,
    boot_id,
    places,
    read_record,
)
from loader.fetch.verify import is_intact
from loader.json_text import parse_json
from loader.types import Artifact, Listing, Manifest
from loader.weights.publishing import replace_file


def write_completed(root: Path, key: str, manifest: Manifest) -> None:
    """Remember that all files of *manifest*, which *key* stands for, are whole below *root*."""
    files = [
        [a.job, a.node_rank, a.relative_file_name, a.source, a.size_bytes] for a in manifest.files
    ]
    place = _place(root, key)
    with contextlib.suppress(OSError):  # nothing may be written there: the files are enough
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, json.dumps({"files": files}).encode())


def read_completed(root: Path, key: str) -> tuple[Listing, ...]:
    """Return the listings of what *key* stands for, empty where a file of it is not here."""
    try:
        entries = parse_json(_place(root, key).read_bytes())["files"]
        artifacts = [Artifact(*entry) for entry in entries]
    except (OSError, KeyError, *DAMAGED):
        return ()
    if not all(_is_here(root, artifact) for artifact in artifacts):
        return ()
    return tuple(_by_job(artifacts))


def _is_here(root: Path, artifact: Artifact) -> bool:
    place = places(root.absolute(), artifact)
    record = read_record(place)
    return record is not None and is_intact(place, record, "size", boot_id())


def _by_job(artifacts: list[Artifact]) -> Iterator[Listing]:
    for job, own in groupby(sorted(artifacts, key=lambda a: a.path), key=lambda a: a.job):
        yield Listing(job, tuple(own))


def _place(root: Path, key: str) -> Path:
    return root / STATE / "completed" / key
