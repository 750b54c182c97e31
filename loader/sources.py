"""A snapshot's checkpoints, each whole: those sharded over ranks are consolidated on the way.

::

    <cache folder>/consolidate-<digest>/     a Hugging Face model, or a PEFT adapter

The digest is of what it was made from; a folder that is there is complete and is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from loader.fetch.files import STATE
from loader.fetch.progress import show_bytes
from loader.settings import Settings
from loader.timeline import Timeline
from loader.types import Checkpoint, Kind, Snapshot
from loader.weights.consolidate.places import has_config, home_folders
from loader.weights.consolidate.serving import serving_files
from loader.weights.inspect import open_checkpoint

SHARDED = frozenset({Kind.DCP, Kind.ZERO, Kind.RANK_SHARDS})
_EVERY_S = 5.0
_log = logging.getLogger("podloader")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model on this disk, or only its small files, and what tells it from any other."""

    path: Path
    identity: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that is no longer sharded, and where it comes from.

    ``place`` is ``<job>/rank-<N>/<folder>``, ``places`` are those of all ranks, ``kind`` what it
    was, ``files`` the digest of every file by path.
    """

    checkpoint: Checkpoint
    kind: Kind
    place: str
    places: frozenset[str]
    files: Mapping[str, str]

    @property
    def job(self) -> str:
        """The training job."""
        return self.place.partition("/")[0]


def find_sources(snapshot: Snapshot, checkpoints: Sequence[Checkpoint]) -> tuple[Source, ...]:
    """Return *checkpoints*, those of *snapshot*, with the place and the digests of each."""
    found = []
    for checkpoint in checkpoints:
        place = _relative(checkpoint.path, snapshot)
        homes = [place]
        if checkpoint.kind in SHARDED:
            homes += [_relative(folder, snapshot) for folder in home_folders(checkpoint)]
        files = {
            file.path: file.digest
            for file in snapshot.files
            if _holds(homes, file.path, deep=checkpoint.kind in SHARDED)
        }
        if checkpoint.kind in SHARDED:
            needed = serving_files(files)
            files = {path: digest for path, digest in files.items() if path in needed}
        found.append(
            Source(checkpoint, checkpoint.kind, place, frozenset(homes), MappingProxyType(files))
        )
    return tuple(found)


def make_whole(
    source: Source,
    settings: Settings,
    timeline: Timeline,
    find_base: Callable[[], BaseModel | None],
) -> Source:
    """Return *source*, consolidated where it is sharded.

    ``find_base`` is asked for the small files of the base model where no rank has a config.

    Raises:
        CheckpointError: see ``loader.weights.consolidate.consolidation.consolidate``.
    """
    if source.checkpoint.kind not in SHARDED:
        return source
    base = None if has_config(source.checkpoint) else find_base()
    made_from: dict[str, object] = {
        "mode": "consolidate",
        "files": dict(source.files),
        "base": dict(base.identity) if base else None,
        "dtype": settings.consolidate_dtype,
    }
    output = output_folder(settings, "consolidate", made_from)
    with timeline.stage("consolidate"):
        if output.is_dir():
            _log.info("the consolidated checkpoint is here already: %s", output)
        else:
            from loader.weights.consolidate.consolidation import consolidate  # torch

            consolidate(
                source.checkpoint,
                output,
                base=base.path if base else None,
                dtype=settings.consolidate_dtype,
                on_progress=log_progress(),
            )
    return replace(source, checkpoint=open_checkpoint(output))


def output_folder(settings: Settings, mode: str, made_from: Mapping[str, object]) -> Path:
    """Return the folder for what is made, named by the digest of what it is made from."""
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    cache = settings.cache_folder or settings.training.download_folder / STATE / "models"
    return cache.absolute() / f"{mode}-{key}"


def log_progress() -> Callable[[int, int], None]:
    """Return what logs a line every few seconds: bytes done and bytes in all."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _EVERY_S:
            last = time.monotonic()
            _log.info("consolidated %s of %s", show_bytes(done), show_bytes(total))

    return report


def _relative(folder: Path, snapshot: Snapshot) -> str:
    return folder.relative_to(snapshot.root).as_posix()


def _holds(folders: Sequence[str], path: str, *, deep: bool) -> bool:
    if not deep:
        return path.rpartition("/")[0] in folders
    return any(path.startswith(f"{folder}/") for folder in folders)
