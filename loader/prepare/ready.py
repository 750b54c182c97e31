"""Checkpoints on disk -> ReadyModel: which one is the base, and what happens to the adapters."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loader.adapters.layers import Ask
from loader.arriving.late import LateWeights
from loader.config.settings import Settings
from loader.errors import CheckpointError
from loader.fetch.progress import Progress
from loader.prepare.adapted import make_adapted
from loader.prepare.bases import WHOLE, bring_base, check_weights, find_base, not_a_base
from loader.prepare.consolidated import (
    SHARDED,
    BaseModel,
    LateShards,
    Source,
    find_sources,
    make_whole,
)
from loader.timeline import Timeline
from loader.types import Checkpoint, Kind, ReadyModel, Snapshot
from loader.weights.formats.refused import find_refusal
from loader.weights.vocabulary import warn_of_ids

_WEIGHTS = (".safetensors", ".bin")
_log = logging.getLogger("podloader")
_RANK = re.compile(r"(?<=/)rank-\d+/")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_HEARING = ("preprocessor_config.json", "processor_config.json")  # how a Whisper hears


def make_ready(
    settings: Settings,
    snapshot: Snapshot,
    checkpoints: Sequence[Checkpoint],
    timeline: Timeline,
    late: LateWeights | None = None,
    shards: LateShards | None = None,
    progress: Progress | None = None,
    ask: Ask | None = None,
) -> ReadyModel:
    """Return the model that *checkpoints*, those of *snapshot*, make up.

    With ``late``, the snapshot lacks the weights of the base: they are fetched when it is known
    that the adapters fit, and merged into while they arrive. With ``shards`` it lacks weights that
    are sharded over ranks: they are read from there. *progress* is told of the download of a base
    that is no checkpoint.

    Raises:
        CheckpointError: nothing to serve, or too much.
        AdapterError: adapters that do not fit their base or each other.
    """
    found = find_sources(snapshot, checkpoints, shards.identities if shards else None)
    _refuse_unservable(found)
    _refuse_unlike_nodes(found, snapshot)

    def find_small_files() -> BaseModel | None:
        return _find_small_files(settings, found, timeline)

    def bring_all() -> BaseModel | None:
        if settings.base_model is None or settings.base_checkpoint is not None:
            return find_small_files()  # a checkpoint is here as a whole
        return bring_base(settings, settings.base_model, timeline)

    if late is not None and any(s.kind is Kind.RANK_SHARDS for s in found):
        with late.fetching() as arriving:  # consolidated they are the base, not as they arrive
            snapshot = arriving.wait()
        return make_ready(settings, snapshot, checkpoints, timeline, progress=progress, ask=ask)
    sources = [
        make_whole(source, settings, timeline, find_small_files, bring_all, shards)
        for source in found
    ]
    base = _base_source(settings, sources)
    rest = [s for s in sources if s is not base]
    adapters = [s for s in rest if s.checkpoint.kind is Kind.ADAPTER]
    models = [s for s in rest if s.checkpoint.kind in WHOLE]
    if adapters and models:
        raise CheckpointError(
            "full models and adapters together",
            problems=[f"{s.checkpoint.kind}: {s.place}" for s in rest],
            next_step="leave one sort out of the paths, or name the model the adapters were "
            f"trained over: base_model: checkpoint:{models[0].place}/",
        )
    if not adapters:
        models = [*models, *([base] if base else [])]
        ready = _whole_model(settings, models, timeline, progress)
    else:
        ready = make_adapted(settings, base, adapters, timeline, late, progress, ask)
    return _warn_of_ids(ready)


def _warn_of_ids(ready: ReadyModel) -> ReadyModel:
    """Return *ready*, with a warning where its tokenizer gives ids that the model lacks."""
    warning = warn_of_ids(ready.tokenizer, ready.path)
    if warning is None:
        return ready
    _log.warning("%s: %s", ready.tokenizer, warning)
    told = ready.provenance.get("warnings")
    warnings = [*(told if isinstance(told, list) else ()), warning]
    return replace(ready, provenance={**ready.provenance, "warnings": warnings})


def _refuse_unservable(sources: Sequence[Source]) -> None:
    for source in sources:
        checkpoint = source.checkpoint
        if refusal := find_refusal(checkpoint):
            raise refusal
        missing = checkpoint.detail.get("missing")
        if missing and checkpoint.kind is not Kind.RANK_SHARDS:  # there, tensors are named
            raise CheckpointError(
                "shards are missing from the checkpoint",
                where=source.place,
                problems=[str(name) for name in missing] if isinstance(missing, list) else (),
                next_step="widen the pattern until it takes every shard",
            )


def _refuse_unlike_nodes(sources: Sequence[Source], snapshot: Snapshot) -> None:
    """Raise CheckpointError where nodes hold other weights under the name of a whole checkpoint.

    Of copies the lowest rank's is taken; sharded ones are compared as they are read.
    """
    digests = {file.path: file.digest for file in snapshot.files}
    named = {file.path: (file.job, _RANK.sub("", file.path)) for file in snapshot.files}
    taken = {path for source in sources for path in source.files}
    copies: dict[tuple[str, str], list[str]] = {}
    for path in named.keys() - taken:
        copies.setdefault(named[path], []).append(path)
    problems = []
    for source in sources:
        if source.kind in SHARDED:
            continue
        for path in source.files:
            if not path.endswith(_WEIGHTS) or path not in named:
                continue
            others = [p for p in copies.get(named[path], ()) if digests[p] != digests[path]]
            problems += [f"{other} differs from {path}" for other in sorted(others)]
    if problems:
        raise CheckpointError(
            "nodes that hold other weights under one name",
            problems=problems,
            next_step="choose one node's in paths: rank-<N>/<checkpoint>/",
        )


def _base_source(settings: Settings, sources: Sequence[Source]) -> Source | None:
    """Return the checkpoint that ``base_model: checkpoint:…`` names, if it names one."""
    name = settings.base_checkpoint
    if name is None:
        return None
    place = f"{name.job}/{name.name}"
    for source in sources:
        if place in source.places:
            if source.checkpoint.kind in WHOLE:
                return source
            raise not_a_base(place, source.checkpoint.kind.value)
    raise not_a_base(place, "no checkpoint")


def _whole_model(
    settings: Settings, models: Sequence[Source], timeline: Timeline, progress: Progress | None
) -> ReadyModel:
    if len(models) != 1:
        raise CheckpointError(
            f"{len(models)} full models, where one is served",
            problems=[model.place for model in models],
            next_step="narrow artifact_references[].paths to one of them",
        )
    model = models[0]
    path = model.checkpoint.path
    check_weights(settings, model.checkpoint)
    tokenizer = path
    if not _has_tokenizer(tokenizer) and settings.base_model and not settings.base_checkpoint:
        tokenizer = find_base(settings, settings.base_model, timeline, progress).path
    if not _has_tokenizer(tokenizer):
        raise CheckpointError(
            "the model came without a tokenizer",
            where=model.place,
            expected=" or ".join(_TOKENIZERS),
            next_step="set base_model to the model it was trained from: its tokenizer is taken",
        )
    if model.checkpoint.kind is Kind.WHISPER and not _has_any(path, _HEARING):
        raise CheckpointError(
            "the Whisper model came without its feature extractor",
            where=model.place,
            expected=" or ".join(_HEARING),
            next_step="save the processor beside the model in the training job",
        )
    provenance: dict[str, object] = {
        "kind": model.kind.value,
        "checkpoint": model.place,
        "files": dict(model.files),
    }
    return ReadyModel(path, (), None, tokenizer, provenance)


def _find_small_files(
    settings: Settings, sources: Sequence[Source], timeline: Timeline
) -> BaseModel | None:
    """Return where the base model's config and tokenizer lie, None where no base is named.

    Shards may be on their way meanwhile: what they are told to counts one download at a time.
    """
    if settings.base_model is None:
        return None
    if (name := settings.base_checkpoint) is None:
        return find_base(settings, settings.base_model, timeline)
    for source in sources:
        if f"{name.job}/{name.name}" in source.places:
            return BaseModel(source.checkpoint.path, {"checkpoint": dict(source.files)})
    return None


def _has_tokenizer(folder: Path) -> bool:
    return _has_any(folder, _TOKENIZERS)


def _has_any(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in names)
