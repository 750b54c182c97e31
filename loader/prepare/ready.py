"""A delivery -> ReadyModel: which checkpoint is the base, and what happens to the others."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loader.adapters.layers import Ask
from loader.adapters.surroundings import has_tokenizer
from loader.arriving.delivery import Delivery
from loader.arriving.filling import Announce
from loader.config.settings import Settings
from loader.errors import CheckpointError
from loader.prepare.adapted import lacks_tokenizer, make_adapted
from loader.prepare.bases import (
    WHOLE,
    ArrivingBase,
    FoundBase,
    LocalBase,
    bring_base,
    check_weights,
    not_a_base,
)
from loader.prepare.checkpoint_sources import (
    SHARDED,
    BaseModel,
    Source,
    find_share,
    find_sources,
    refuse_unlike_nodes,
)
from loader.prepare.consolidated import make_whole
from loader.prepare.engine_start import Announcement
from loader.prepare.wholeness import WholenessCheck
from loader.serve.vllm.stages import Stage, find_stage
from loader.types import Kind, ReadyModel
from loader.weights.formats.refused import find_refusal
from loader.weights.formats.serving import is_shard
from loader.weights.inspect import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODULES,
    find_checkpoints,
    is_safetensors,
)
from loader.weights.vocabulary import warn_of_ids

if TYPE_CHECKING:
    from loader.weights.writer import CheckpointWriter  # torch

_log = logging.getLogger("podloader")
_HEARING = ("preprocessor_config.json", "processor_config.json")  # how a Whisper hears


def make_ready(
    settings: Settings,
    delivery: Delivery,
    check: WholenessCheck,
    ask: Ask | None = None,
    announce: Announce | None = None,
) -> ReadyModel:
    """Return the model that the files of *delivery* make up.

    Small files come first. They tell what becomes of the weights: with ``weights_only_fetch`` those
    that are sharded over ranks are read at the origin, by ranges; a base's are fetched when it is
    known that the adapters fit, and merged into while they come. What is not made here goes through
    *check*. *announce* is told of weights
    that are on their way into what is returned.

    Raises:
        CheckpointError: nothing to serve, or too much.
        AdapterError: adapters that do not fit their base or each other.
        LoaderError: as a fetch.
    """
    timeline, progress = delivery.timeline, delivery.progress
    announcement = announce = Announcement(announce) if announce else None
    stage = find_stage(settings.engine_args)
    is_followed = announce is not None or stage is not None
    later = set(delivery.find_absent(_find_later(settings, delivery.paths, is_followed)))
    first = [path for path in delivery.paths if path not in later]
    snapshot = delivery.bring(first, "download of small files" if later else "download")
    with timeline.stage("inspect"):
        checkpoints = find_checkpoints(delivery.root, delivery.paths, delivery.read_header)
    found = find_sources(delivery, checkpoints)
    _refuse_unservable(found)
    refuse_unlike_nodes((p for s in found if s.kind not in SHARDED for p in s.files), snapshot)
    if stage is not None:
        found = tuple(_cut(found, stage, later))
    later -= _begin_shards(settings, delivery, found, later)

    def bring_named(*, weights: bool) -> BaseModel | None:
        """Return the base model; of a checkpoint that is one, its small files are here."""
        if settings.base_model is None:
            return None
        if settings.base_checkpoint is None:
            # Shards may be on their way: what is told of them is of one download at a time.
            return bring_base(settings, settings.base_model, timeline, weights=weights)
        base = _find_base_source(settings, found)
        if base is not None and weights:
            delivery.bring(base.paths)
        return base.as_base(weights=weights) if base else None

    sources = [
        make_whole(
            source,
            settings,
            partial(bring_named, weights=False),
            partial(bring_named, weights=True),
            partial(
                _announce_made,
                settings,
                delivery,
                source,
                announce if len(found) == 1 else None,
                _find_base_source(settings, found),
            ),
        )
        for source in found
    ]
    base = _find_base_source(settings, sources, expected=True)
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
        if base and models:  # what it was trained over: its weights are here if they were needed
            later -= set(base.paths)
        models = models or ([base] if base else [])
        ready = _serve_whole(settings, delivery, models, later, announce, base, check)
    else:
        under = _as_base(settings, base, later) if base else None
        if under is None:
            delivery.bring(sorted(later))
        ready = make_adapted(settings, under, adapters, timeline, progress, ask, announce, check)
    if announcement:
        announcement.tell(ready)
    return _warn_of_ids(ready)


def _find_later(settings: Settings, paths: Sequence[str], is_followed: bool) -> Iterator[str]:
    """Yield the weights that what is in the other files decides about, or that are followed.

    They are shards, and those of a base: all others are fetched at once with the small files.
    """
    base = settings.base_checkpoint
    home = f"{base.job}/{base.name}" if base else ""
    has_others = any(is_shard(path) or path.endswith(f"/{ADAPTER_CONFIG}") for path in paths)
    known = set(paths)
    for path in paths:
        folder, _, name = path.rpartition("/")
        if f"{folder.rpartition('/')[0]}/{MODULES}" in known:
            continue  # a part of the model above, such as a projection: read beside its config
        of_base = folder == home and has_others and name.endswith(".safetensors")
        is_model = of_base or (is_followed and is_safetensors(name))
        if is_shard(path) or (is_model and name not in ADAPTER_WEIGHTS):
            yield path


def _cut(sources: Sequence[Source], stage: Stage, later: set[str]) -> Sequence[Source]:
    """Return *sources*; a model that is alone is cut down to *stage*, where that is known of it.

    One that is here is served as it is.
    """
    if len(sources) != 1 or not later.intersection(sources[0].paths):
        return sources
    share = find_share(sources[0].checkpoint, stage)
    told = share.text if share else "all of the model: what a stage of it needs is not known"
    _log.info("this node takes %s", told)
    return (replace(sources[0], share=share),)


def _begin_shards(
    settings: Settings, delivery: Delivery, sources: Sequence[Source], later: set[str]
) -> set[str]:
    """Have shards brought that come whole. Return which of *later* are dealt with by that.

    With ``weights_only_fetch`` the others stay where they are, if they are pinned there.
    """
    only = settings.weights_only_fetch or any(source.share for source in sources)
    needed = [p for s in sources if s.is_cut for p in s.paths if p in later]
    shards = [path for path in sorted(later) if is_shard(path)]
    if only and delivery.is_pinned(needed):
        return {*needed, *shards}
    if needed:
        delivery.begin([*needed, *(() if only else shards)])
    return {*needed, *shards} if needed or only else set()


def _as_base(settings: Settings, source: Source, later: Collection[str]) -> FoundBase:
    """Return a checkpoint as the base of adapters; *later* are files that are still to come."""
    check_weights(settings, source.checkpoint)
    if source.is_made:
        return LocalBase(settings, source.checkpoint.path, source)
    path = source.checkpoint.path
    return ArrivingBase(path, source.delivery, source.as_base, sorted(later))


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


def _find_base_source(
    settings: Settings, sources: Sequence[Source], *, expected: bool = False
) -> Source | None:
    """Return the checkpoint that ``base_model: checkpoint:…`` names, if it names one.

    Raises:
        ConfigError: it is *expected*, and no full model.
    """
    if (name := settings.base_checkpoint) is None:
        return None
    place = f"{name.job}/{name.name}"
    source = next((source for source in sources if place in source.places), None)
    if expected and (source is None or source.checkpoint.kind not in WHOLE):
        raise not_a_base(place, source.checkpoint.kind.value if source else "no checkpoint")
    return source


def _serve_whole(
    settings: Settings,
    delivery: Delivery,
    models: Sequence[Source],
    later: Collection[str],
    announce: Announce | None,
    base: Source | None,
    check: WholenessCheck,
) -> ReadyModel:
    """Return the one model of *models*; of its files *later* are still to come.

    *base* is the checkpoint that it was trained over, if that is one.
    """
    if len(models) != 1:
        raise CheckpointError(
            f"{len(models)} full models, where one is served",
            problems=[model.place for model in models],
            next_step="narrow artifact_references[].paths to one of them",
        )
    model = models[0]
    path = model.checkpoint.path
    check_weights(settings, model.checkpoint)
    ready = _describe_whole(settings, model, path, delivery, base)
    weights = None
    if later:
        coming = ArrivingBase(path, delivery, model.as_base, sorted(later))
        weights = coming.weights if announce else None
        coming.begin()
    if later and not weights:
        delivery.wait()
    if not model.is_made:  # consolidating has compared it
        check.begin(model.place, path, weights)
    if announce and weights:
        announce(weights, ready)
    snapshot = delivery.wait()
    if model.kind not in SHARDED:
        refuse_unlike_nodes(model.files, snapshot)
    check.wait()
    return replace(ready, provenance=ready.provenance | {"files": dict(model.files)})


def _announce_made(
    settings: Settings,
    delivery: Delivery,
    source: Source,
    announce: Announce | None,
    base: Source | None,
    writer: CheckpointWriter,
) -> None:
    """Announce the model that is being written; an adapter is none."""
    if announce is None or any(name.startswith("adapter_model") for name in writer.files()):
        return
    ready = _describe_whole(settings, source, writer.path, delivery, base)
    is_own = ready.tokenizer == writer.path
    tokenizer = writer.folder if is_own else ready.tokenizer
    announce(writer.fill(), replace(ready, path=writer.folder, tokenizer=tokenizer))


def _describe_whole(
    settings: Settings, model: Source, path: Path, delivery: Delivery, base: Source | None
) -> ReadyModel:
    """Return *model*, whose small files are in *path*; *base* may have its tokenizer.

    Raises:
        CheckpointError: it lacks something beside its weights.
    """
    tokenizer = path
    if not has_tokenizer(tokenizer) and base:
        tokenizer = base.checkpoint.path
    elif not has_tokenizer(tokenizer) and (name := settings.base_model):
        progress = None if model.kind in SHARDED and not model.is_made else delivery.progress
        tokenizer = bring_base(settings, name, delivery.timeline, progress, weights=False).path
    if not has_tokenizer(tokenizer):
        raise lacks_tokenizer(model.place, has_base=bool(settings.base_model))
    if model.checkpoint.kind is Kind.WHISPER and not _has_any(path, _HEARING):
        raise CheckpointError(
            "the Whisper model came without its feature extractor",
            where=model.place,
            expected=" or ".join(_HEARING),
            next_step="save the processor beside the model in the training job",
        )
    provenance: dict[str, object] = {"kind": model.kind.value, "checkpoint": model.place}
    if model.share is not None:
        name = model.place.rpartition("/")[2]
        provenance |= {"share": model.share.text, **({"name": name} if name else {})}
    return ReadyModel(path, (), None, tokenizer, provenance)


def _has_any(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in names)
