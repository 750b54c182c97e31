"""A snapshot's checkpoints, each whole: those sharded over ranks are consolidated on the way.

::

    <cache folder>/
      digests/                            of files that are not ours, see ``loader.fetch.digests``
      consolidate-<digest>/               a Hugging Face model, or a PEFT adapter
      .consolidate-<digest>.<plan>.partial/   the same while its bytes come by ranges; kept if that
                                          ends before its time, and gone on with
      .consolidating.<random>.partial/    the same while its files arrive, whose digests come last

The digest is of what it was made from, by the digests of all files; a folder that is there is
complete, was made from files that had them, and is taken as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from loader.config.settings import Settings
from loader.errors import FormatError
from loader.fetch.crc import crc64nvme
from loader.fetch.digests import Digests
from loader.fetch.files import STATE
from loader.prepare.inputs import prove
from loader.timeline import Timeline
from loader.types import Checkpoint, Kind, Snapshot
from loader.units import show_bytes
from loader.weights.formats.learning import learning_names
from loader.weights.formats.places import has_config, home_folders, weight_folders
from loader.weights.formats.rank_files import Files, LocalFiles
from loader.weights.formats.refused import find_refusal
from loader.weights.formats.serving import serving_files
from loader.weights.header import read_header
from loader.weights.index import read_weight_map
from loader.weights.inspect import open_checkpoint
from loader.weights.publishing import disk_error, scratch_folder, sweep, use

SHARDED = frozenset({Kind.DCP, Kind.ZERO, Kind.DTENSOR, Kind.RANK_SHARDS})
_EVERY_S = 5.0
_MODE, _COMING = "consolidate", "consolidating"
_log = logging.getLogger("podloader")

Report = Callable[[int, int], None]  # told of bytes done, and of bytes in all


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
    """A checkpoint that is no longer sharded, and where it comes from.

    ``place`` is ``<job>/rank-<N>/<folder>``, ``places`` are those of all ranks, ``kind`` what it
    was, ``files`` the digest of every file by path, ``kept`` as a ``BaseModel``'s.
    """

    checkpoint: Checkpoint
    kind: Kind
    place: str
    places: frozenset[str]
    files: Mapping[str, str]
    kept: Mapping[Path, str] = field(default_factory=dict, compare=False)

    @property
    def job(self) -> str:
        """The training job."""
        return self.place.partition("/")[0]


class LateShards(Protocol):
    """Weight shards that are not on this disk: they stay at the origin, or are on their way."""

    @property
    def identities(self) -> Mapping[str, str] | None:
        """What tells each shard from other versions, by path; None where digests come later."""

    @property
    def can_be_resumed(self) -> bool:
        """Whether what an earlier run read of them is known to be of the same version."""

    def opened(
        self, checkpoint: Checkpoint
    ) -> contextlib.AbstractContextManager[tuple[Files, Report]]:
        """Give the files of *checkpoint*, and what is to be told how far it has come."""

    def wait(self) -> Snapshot:
        """Return the snapshot of all that is fetched, when it is."""


def find_sources(
    snapshot: Snapshot,
    checkpoints: Sequence[Checkpoint],
    identities: Mapping[str, str] | None = None,
) -> tuple[Source, ...]:
    """Return *checkpoints*, those of *snapshot*, with the place and the digests of each.

    *identities* stand for the digests of files that are not in the snapshot, by path.
    """
    known = {file.path: file.digest for file in snapshot.files} | dict(identities or {})
    reused = {file.path for file in snapshot.files if file.reused}
    found = []
    for checkpoint in checkpoints:
        place = _relative(checkpoint.path, snapshot)
        homes = [place]
        if checkpoint.kind in SHARDED:
            homes += [_relative(folder, snapshot) for folder in home_folders(checkpoint)]
        files = {
            path: digest
            for path, digest in known.items()
            if _holds(homes, path, deep=checkpoint.kind in SHARDED)
        }
        if checkpoint.kind in SHARDED:
            needed = serving_files(files)
            files = {path: digest for path, digest in files.items() if path in needed}
        found.append(
            Source(
                checkpoint,
                checkpoint.kind,
                place,
                frozenset(homes),
                MappingProxyType(files),
                {snapshot.root / path: files[path] for path in files if path in reused},
            )
        )
    return tuple(found)


def make_whole(
    source: Source,
    settings: Settings,
    timeline: Timeline,
    find_base: Callable[[], BaseModel | None],
    bring_base: Callable[[], BaseModel | None],
    shards: LateShards | None = None,
) -> Source:
    """Return *source*, consolidated where it is sharded.

    ``find_base`` is asked for the small files of the base model where no rank has a config,
    ``bring_base`` for all of it where the frozen parameters were not saved.

    Raises:
        CheckpointError: see ``loader.weights.formats.consolidation.consolidate``.
    """
    if source.checkpoint.kind not in SHARDED:
        return source
    if source.checkpoint.kind is Kind.ZERO and _needs_base(source.checkpoint, shards):
        base = bring_base()
    else:
        base = None if has_config(source.checkpoint) else find_base()
    is_coming = shards is not None and shards.identities is None
    cache = cache_folder(settings)
    sweep(cache, _COMING)
    with contextlib.ExitStack() as stack:
        if is_coming:
            output = stack.enter_context(scratch_folder(cache, _COMING)) / "model"
        else:
            output = _named(source, base, settings)
        with timeline.stage("consolidate"):
            if is_made(output):
                _log.info("the consolidated checkpoint is here already: %s", output)
            else:
                sweep(cache, f"{_MODE}-*", but=output.name)
                prove_kept(settings, source, *([base] if base else []))
                _consolidate(source.checkpoint, output, base, settings, shards)
        if shards is not None and is_coming:
            (source,) = find_sources(shards.wait(), [source.checkpoint])
            prove_kept(settings, source)
            output = give_name(output, _named(source, base, settings))
    use(output)
    return replace(source, checkpoint=open_checkpoint(output), kept={})


def _needs_base(checkpoint: Checkpoint, shards: LateShards | None) -> bool:
    from loader.weights.formats.frozen import needs_base  # torch

    if find_refusal(checkpoint):  # which says more
        return False
    with contextlib.ExitStack() as stack:
        if shards is not None:
            files, _ = stack.enter_context(shards.opened(checkpoint))
            return needs_base(checkpoint, files)
        return needs_base(checkpoint, stack.enter_context(LocalFiles(weight_folders(checkpoint))))


def prove_kept(settings: Settings, *inputs: Source | BaseModel) -> None:
    """Check what this run did not bring. Raises as ``prove`` does."""
    if settings.verify == "full":  # which has proved all that was fetched before
        inputs = tuple(one for one in inputs if isinstance(one, BaseModel) and one.is_theirs)
    for one in inputs:
        theirs = isinstance(one, BaseModel) and one.is_theirs
        prove(digests(settings), one.kept, is_theirs=theirs)


def digests(settings: Settings) -> Digests:
    """Return the digests of models' files on this disk."""
    return Digests(cache_folder(settings) / "digests")


def _consolidate(
    checkpoint: Checkpoint,
    output: Path,
    base: BaseModel | None,
    settings: Settings,
    shards: LateShards | None,
) -> None:
    with contextlib.ExitStack() as stack:
        learn = stack.enter_context(learning_names())
        files, report = None, log_progress()
        if shards is not None:
            files, report = stack.enter_context(shards.opened(checkpoint))

        from loader.weights.formats.consolidation import consolidate  # torch

        consolidate(
            checkpoint,
            output,
            files=files,
            base=base.path if base else None,
            dtype=settings.consolidate_dtype,
            on_progress=report,
            learn=learn,
            # What goes by ranges from the origin is nowhere on this disk but in what is written.
            digest=crc64nvme if shards is not None and shards.can_be_resumed else None,
        )


def _named(source: Source, base: BaseModel | None, settings: Settings) -> Path:
    made_from = {
        "mode": _MODE,
        "files": dict(source.files),
        "base": dict(base.identity) if base else None,
        "dtype": settings.consolidate_dtype,
    }
    return output_folder(settings, _MODE, made_from)


def give_name(folder: Path, name: Path) -> Path:
    """Return *name*, where *folder* lies now; one that is there already is the same and stays.

    Raises:
        DiskError: the disk refused.
    """
    try:
        name.exists() or folder.rename(name)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise disk_error(name, error) from error
    return name


def is_made(output: Path) -> bool:
    """Return whether *output* was made before, and its weights have their whole length still.

    Nothing of it was synced to the disk: a machine that went down may have lost some. It is removed
    then.

    Raises:
        DiskError: the disk refused.
    """
    if not output.is_dir():
        return False
    try:
        for path in output.glob("*.safetensors"):
            read_header(path)
        for index in output.glob("*.safetensors.index.json"):
            if any(not (output / name).is_file() for name in read_weight_map(index).values()):
                raise FormatError("a shard is missing")
    except FormatError as error:
        _log.warning("%s is not whole, it is made anew: %s", output, error.what)
        try:
            shutil.rmtree(output)
        except OSError as refused:
            raise disk_error(output, refused) from refused
        return False
    return True


def output_folder(settings: Settings, mode: str, made_from: Mapping[str, object]) -> Path:
    """Return the folder for what is made, named by the digest of what it is made from."""
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder(settings) / f"{mode}-{key}"


def cache_folder(settings: Settings) -> Path:
    """Return where merged and consolidated models are kept."""
    return (settings.cache_folder or models_folder(settings.training.download_folder)).absolute()


def models_folder(root: Path) -> Path:
    """Return where they are kept for the download folder *root*, unless the settings say."""
    return root / STATE / "models"


def log_progress() -> Report:
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
