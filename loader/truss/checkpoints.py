"""The files alone: for a Truss that builds its own model from them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from loader import boot
from loader.config.credentials import Secrets
from loader.config.settings import Settings
from loader.fetch.progress import LogProgress
from loader.resolve.patterns import match_pattern

_log = logging.getLogger("podloader")


def fetch_checkpoints(
    config: Mapping[str, Any] | Path | str,
    secrets: Secrets | None = None,
    data_dir: Path | None = None,
) -> tuple[Path, ...]:
    """Return the folders that the ``training_checkpoints`` of *config* name, whole on this disk.

    *config* is a Truss config, as a Truss model gets it or as a file; *secrets* are Truss's, looked
    up by name only. Relative paths in a config that is no file are relative to the Truss, which
    *data_dir*, as a Truss model gets it, lies in. A pattern with ``/`` at its end gives the folder
    that it names, once for each rank; another gives the folders of its files. They are in the order
    of the patterns. What an earlier call fetched is proved and taken.

    Raises:
        LoaderError: see ``loader.errors``; another call goes on from what is on disk.
    """
    if _log.level == logging.NOTSET:
        _log.setLevel(logging.INFO)
    truss = Path(data_dir).parent if data_dir is not None else None
    settings = Settings.load(config, secrets=secrets, folder=truss)
    snapshot = boot.fetch_files(settings, LogProgress())
    names = [tuple(file.path.split("/", 1)) for file in snapshot.files]
    found: dict[Path, None] = {}
    for reference in settings.training.artifact_references:
        own = [name for job, name in names if job == reference.training_job_id]
        for pattern in reference.paths:
            for folder in sorted(set(_folders(pattern, own))):
                found[snapshot.root / reference.training_job_id / folder] = None
    return tuple(found)


def _folders(pattern: str, names: list[str]) -> Iterator[str]:
    """Yield the folder of each name that *pattern* takes: the highest that it means."""
    for name in names:
        if not match_pattern(pattern, name):
            continue
        *folders, _ = name.split("/")
        above = list(accumulate(folders, lambda path, part: f"{path}/{part}"))
        whole = (f for f in above if match_pattern(pattern.rstrip("/"), f))
        yield next(whole, above[-1]) if pattern.endswith("/") else above[-1]
