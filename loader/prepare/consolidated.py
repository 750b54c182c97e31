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
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loader.config.settings import Settings
from loader.errors import FormatError
from loader.fetch.crc import crc64nvme
from loader.fetch.digests import Digests
from loader.fetch.files import STATE
from loader.fetch.progress import LogProgress
from loader.prepare.checkpoint_sources import SHARDED, BaseModel, Source
from loader.prepare.inputs import prove
from loader.types import Kind
from loader.weights.formats.learning import learning_names
from loader.weights.formats.places import has_config
from loader.weights.formats.refused import find_refusal
from loader.weights.header import read_header
from loader.weights.index import read_weight_map
from loader.weights.inspect import open_checkpoint, write_share
from loader.weights.publishing import disk_error, scratch_folder, sweep, use

if TYPE_CHECKING:
    from loader.weights.writer import CheckpointWriter  # torch

_MODE, _COMING = "consolidate", "consolidating"
_log = logging.getLogger("podloader")

OnBegin = Callable[["CheckpointWriter"], None]


def make_whole(
    source: Source,
    settings: Settings,
    find_base: Callable[[], BaseModel | None],
    bring_base: Callable[[], BaseModel | None],
    on_begin: OnBegin = lambda writer: None,
) -> Source:
    """Return *source*, consolidated where it is sharded; its shards may be on their way.

    ``find_base`` is asked for the small files of the base model where no rank has a config,
    ``bring_base`` for all of it where the frozen parameters were not saved.

    Raises:
        CheckpointError: see ``loader.weights.formats.consolidation.consolidate``.
    """
    if not source.is_cut:
        return source
    delivery = source.delivery
    if source.kind is Kind.ZERO and _needs_base(source):
        base = bring_base()
    else:
        base = None if has_config(source.checkpoint) else find_base()
    cache = cache_folder(settings)
    sweep(cache, _COMING)
    with contextlib.ExitStack() as stack:
        is_named = len(source.files) == len(source.paths)
        if is_named:
            output = _named(source, base, settings)
        else:
            output = stack.enter_context(scratch_folder(cache, _COMING)) / "model"
        with delivery.timeline.stage("consolidate"):
            if is_made(output):
                _log.info("the consolidated checkpoint is here already: %s", output)
            else:
                sweep(cache, f"{_MODE}-*", but=output.name)
                prove_kept(settings, source, *([base] if base else []))
                _consolidate(source, output, base, settings, on_begin)
        if not is_named:
            delivery.wait()
            prove_kept(settings, source)
            output = give_name(output, _named(source, base, settings))
    use(output)
    checkpoint = open_checkpoint(output)
    if source.share is not None:  # for others it is no model
        checkpoint = replace(checkpoint, kind=Kind.FULL)
    return replace(source, checkpoint=checkpoint, is_made=True)


def _needs_base(source: Source) -> bool:
    from loader.weights.formats.frozen import needs_base  # torch

    if find_refusal(source.checkpoint):  # which says more
        return False
    with source.delivery.opened(source.checkpoint) as (files, _):
        return needs_base(source.checkpoint, files)


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
    source: Source, output: Path, base: BaseModel | None, settings: Settings, on_begin: OnBegin
) -> None:
    delivery = source.delivery
    # What goes by ranges from the origin is nowhere on this disk but in what is written.
    digest = crc64nvme if delivery.can_be_resumed(source.paths) else None
    with contextlib.ExitStack() as stack:
        learn = stack.enter_context(learning_names())
        files, ranges = stack.enter_context(delivery.opened(source.checkpoint))
        progress = delivery.progress or LogProgress()
        local = None if ranges else stack.enter_context(progress.working("consolidated"))

        from loader.weights.formats.consolidation import consolidate  # torch

        def begin(writer: CheckpointWriter) -> None:
            if source.share is not None:
                write_share(writer.path, source.share.text)
            on_begin(writer)

        consolidate(
            source.checkpoint,
            output,
            files=files,
            base=base.path if base else None,
            dtype=settings.consolidate_dtype if source.kind in SHARDED else None,
            on_progress=ranges.report if ranges else local,
            on_begin=begin,
            digest=digest,
            learn=learn,
            keep=source.share.needed if source.share else None,
        )


def _named(source: Source, base: BaseModel | None, settings: Settings) -> Path:
    made_from: dict[str, object] = {
        "mode": _MODE,
        "files": dict(source.files),
        "base": dict(base.identity) if base else None,
        "dtype": settings.consolidate_dtype,
    }
    if source.share is not None:
        made_from |= {"stage": source.share.text, "kind": source.kind.value}
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
