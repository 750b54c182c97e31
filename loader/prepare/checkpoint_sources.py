"""The checkpoints of a delivery: where each came from, and what tells its bytes from any others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loader.arriving.delivery import Delivery
from loader.errors import CheckpointError
from loader.prepare.inputs import small_names
from loader.serve.vllm.stages import Share, Stage
from loader.types import Checkpoint, Kind, Snapshot
from loader.weights.formats.places import home_folders
from loader.weights.formats.serving import serving_files
from loader.weights.inspect import ADAPTER_CONFIG, read_json

_WEIGHTS = (".safetensors", ".bin")
_RANK = re.compile(r"(?<=/)rank-\d+/")
SHARDED = frozenset({Kind.DCP, Kind.ZERO, Kind.DTENSOR, Kind.RANK_SHARDS})


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model on this disk, or only its small files, and what tells it from any other.

    ``kept`` are files that this run did not bring and has yet to prove, with the digests that they
    have to have; ``is_theirs``: they are a person's own.
    """

    path: Path
    identity: Mapping[str, object]
    kept: Mapping[Path, str] = field(default_factory=dict, compare=False)
    is_theirs: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint, and the files of *delivery* that it was, or is, made of.

    ``place`` is ``<job>/rank-<N>/<folder>``, ``places`` are those of all ranks, ``kind`` what it
    was before it was consolidated, ``is_made``: it has been. ``share`` is what this
    node takes, where that is not all of it.
    """

    checkpoint: Checkpoint
    kind: Kind
    place: str
    places: frozenset[str]
    paths: tuple[str, ...]
    delivery: Delivery = field(repr=False)
    is_made: bool = False
    share: Share | None = None

    @property
    def is_cut(self) -> bool:
        """Return whether it is made from what lies in parts, or is a part of it."""
        return self.kind in SHARDED or self.share is not None

    @property
    def job(self) -> str:
        """The training job."""
        return self.place.partition("/")[0]

    @property
    def files(self) -> Mapping[str, str]:
        """What tells the bytes of every file from others, by path; not of those on their way."""
        return self.delivery.identify(self.paths)

    @property
    def kept(self) -> Mapping[Path, str]:
        """Those of its files that this run did not bring, as a ``BaseModel``'s."""
        return {} if self.is_made else self.delivery.find_kept(self.paths)

    def as_base(self, *, weights: bool = True) -> BaseModel:
        """Return it as a base that is here; without *weights*, only its small files are."""
        paths = self.paths if weights else small_names(self.paths)
        kept = {} if self.is_made else self.delivery.find_kept(paths)
        files = dict(self.delivery.identify(paths))
        return BaseModel(self.checkpoint.path, {"checkpoint": files}, kept)


def find_sources(delivery: Delivery, checkpoints: Sequence[Checkpoint]) -> tuple[Source, ...]:
    """Return *checkpoints*, those of *delivery*, each with the places and files that it is of."""
    found = []
    for checkpoint in checkpoints:
        place = _relative(checkpoint.path, delivery)
        homes, paths = [place], delivery.paths
        if checkpoint.kind in SHARDED:
            homes += [_relative(folder, delivery) for folder in home_folders(checkpoint)]
            prefixes = tuple(f"{home}/" for home in homes)
            paths = tuple(path for path in paths if path.startswith(prefixes))
            needed = serving_files(paths)
            paths = tuple(path for path in paths if path in needed)
        else:
            paths = tuple(path for path in paths if path.rpartition("/")[0] == place)
        found.append(Source(checkpoint, checkpoint.kind, place, frozenset(homes), paths, delivery))
    return tuple(found)


def find_share(checkpoint: Checkpoint, stage: Stage) -> Share | None:
    """Return what a node with *stage* takes of a model; None where that is all, or not known."""
    is_model = checkpoint.kind is Kind.FULL and checkpoint.detail.get("format") == "safetensors"
    config = checkpoint.path / "config.json"
    is_sharded = checkpoint.kind in SHARDED and not (checkpoint.path / ADAPTER_CONFIG).exists()
    if not (is_model or is_sharded) or not config.is_file():
        return None
    share = Share(stage, read_json(config))
    return share if stage.knows(share.config) else None


def refuse_unlike_nodes(taken: Iterable[str], snapshot: Snapshot) -> None:
    """Raise CheckpointError where nodes hold other weights under the name of a whole checkpoint.

    *taken* are its files, the lowest rank's of copies; sharded ones are compared as they are read.
    """
    files = {file.path: file for file in snapshot.files if file.path.endswith(_WEIGHTS)}
    copies: dict[tuple[str, str], list[str]] = {}
    for path, file in files.items():
        copies.setdefault((file.job, _RANK.sub("", path)), []).append(path)
    problems = [
        f"{other} differs from {path}"
        for path in taken
        if path in files
        for other in sorted(copies[files[path].job, _RANK.sub("", path)])
        if files[other].digest != files[path].digest
    ]
    if problems:
        raise CheckpointError(
            "nodes that hold other weights under one name",
            problems=problems,
            next_step="choose one node's in paths: rank-<N>/<checkpoint>/",
        )


def _relative(folder: Path, delivery: Delivery) -> str:
    return folder.relative_to(delivery.root).as_posix()
