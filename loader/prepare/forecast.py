"""What a start will do, and what it takes, before it: read from names, sizes and small files.

Nothing large is fetched. What cannot be known is a warning, never a failure: the start will tell.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from loader.adapters.attach import decide, name_adapters
from loader.adapters.base_task import decide_for_base, is_pooled
from loader.arriving.delivery import Delivery
from loader.config.settings import Settings
from loader.errors import LoaderError, redact
from loader.fetch.snapshot import FetchOptions
from loader.http.expiry import expiry
from loader.prepare.bases import WHOLE
from loader.prepare.checkpoint_sources import SHARDED, find_share
from loader.prepare.consolidated import cache_folder
from loader.prepare.engine_start import Base, ServedWeights, why_files
from loader.prepare.fits import weights_by_folder
from loader.prepare.named_base import named_base, named_revision
from loader.prepare.planned_base import HUB, LOCAL, URL, BaseFile, PlannedBase, plan_base
from loader.prepare.remote import read_checkpoints
from loader.serve.machine import read_machine
from loader.serve.room import Room, describe_short, engine_room
from loader.serve.size import count_parameters, dtype_bytes, served_bytes, stored_dtype
from loader.serve.vllm.stages import Stage, find_stage
from loader.serve.vllm.streaming import why_not_streamed
from loader.stores.base import Progress, Store
from loader.stores.registry import is_remote
from loader.timeline import Timeline
from loader.types import Artifact, Checkpoint, Kind, Listing, Manifest, total_bytes
from loader.units import show_bytes
from loader.weights.formats.places import home_folders
from loader.weights.formats.refused import find_refusal
from loader.weights.formats.serving import is_shard
from loader.weights.inspect import ADAPTER_CONFIG, describe_adapter, read_json
from loader.weights.publishing import temporary_folder

_CONFIG = "config.json"
_TOLD = 3  # models
_ADAPTER = "adapter_model"
_BASES: Mapping[str, Base] = {LOCAL: "local", HUB: "hub", URL: "url"}


@dataclass(frozen=True, slots=True)
class Model:
    """The model that is served: its config.json, and the bytes of its weights if they are known."""

    config: Mapping[str, object]
    bytes: int | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """The files of a start with those of its base, how the engine is started, and the room.

    ``mode``: the model as it is, ``attach``, ``merge``, or empty where nobody knows yet;
    ``consolidates``: what is sharded over ranks is made whole first; ``served_is_sharded``: the
    model or base is. ``urls_end`` is when the first of the signed URLs ends that are still needed.
    """

    manifest: Manifest
    base: PlannedBase | None = None
    mode: str = ""
    why: str = ""
    consolidates: bool = False
    model: Model | None = None
    room: tuple[Room, ...] = ()
    urls_end: datetime | None = None
    warnings: tuple[str, ...] = ()
    engine: str = ""
    weights_from: str = ""
    served_is_sharded: bool = False
    share: str = ""
    """What the node that was asked about takes of the model, where that is not all of it."""
    share_bytes: int | None = None

    @property
    def base_files(self) -> tuple[BaseFile, ...]:
        """The files of a base that podloader brings; one that lies on this machine has none."""
        return () if self.base is None or self.base.is_local else self.base.files


def forecast(
    settings: Settings, manifest: Manifest, store: Store, progress: Progress | None = None
) -> Forecast:
    """Return what a start with the files of *manifest* will do. *store* has their origin.

    Of the checkpoints and the base, only listings and small files are read.
    """
    found = begin(settings, manifest)
    try:
        with temporary_folder() as root:
            checkpoints = [
                c
                for c in read_checkpoints(_listings(manifest), store, root, progress)
                if c.kind not in (Kind.OPTIMIZER, Kind.UNKNOWN) and find_refusal(c) is None
            ]
            with (progress or Progress()).step("base model"):
                found = _decide(settings, found, checkpoints, root)
            if stage := find_stage(settings.engine_args):
                found = _cut(settings, found, checkpoints, Cut(stage, store, root))
    except LoaderError as error:
        step = f"; {error.next_step}" if error.next_step else ""
        told = f"what a start would make of the files is not known: {error.what}{step}"
        found = _warned(found, told)
    found = replace(
        found,
        room=tuple(_room(settings, found)),
        weights_from=_weights_from(settings, found),
    )
    short = [f"not enough {describe_short(room)}" for room in found.room if room.is_short]
    closed = [
        f"user {os.getuid()} cannot write {room.folder}"
        for room in found.room
        if room.folder and room.needed_bytes and not os.access(room.folder, os.W_OK | os.X_OK)
    ]
    return replace(found, warnings=(*found.warnings, *short, *closed))


def _weights_from(settings: Settings, found: Forecast) -> str:
    """Return whether the engine loads weights while they arrive, or from files, and why."""
    if settings.engine != "vllm":
        return "files"
    why = why_not_streamed(settings.engine_start, settings.engine_args)
    if why := why or why_files(_served_weights(settings, found)):
        return f"files: {why}"
    return "while they arrive"


def _served_weights(settings: Settings, found: Forecast) -> ServedWeights:
    """Return what is known of them; what an earlier result was made from is not compared."""
    of_base = () if found.base is None else found.base.files
    names = {a.name for a in found.manifest.files} | {f.path for f in of_base}
    weights = [n for n in names if n.endswith(".safetensors") and _ADAPTER not in n]
    makes = {"consolidate": found.consolidates, "merge": found.mode == "merge"}
    made = {how for how in makes if any(cache_folder(settings).glob(f"{how}-*"))}
    # What is read at the origin and made whole here is never on this disk as it was.
    kept = {a.path for a in found.manifest.files if "consolidate" in made and is_shard(a.path)}
    absent = {path for path, told in found.manifest.presence.items() if told == "missing"} - kept
    base: Base = "checkpoint" if settings.base_checkpoint else ""
    if found.base is not None:
        base = _BASES[found.base.origin]
    return ServedWeights(
        found.mode,
        "" if found.mode == "as it is" else base,
        is_sharded=found.consolidates and found.served_is_sharded,
        is_pickled=not weights and not found.consolidates,
        is_here=not absent
        and not (found.base and found.base.missing)
        and all(how in made for how, is_wanted in makes.items() if is_wanted),
    )


def begin(settings: Settings, manifest: Manifest) -> Forecast:
    """Return what is known of *manifest* without a request: when its signed URLs end."""
    needed = [a for a in manifest.files if manifest.presence.get(a.path) != "proved"]
    ends = min(filter(None, (expiry(artifact.url) for artifact in needed)), default=None)
    found = Forecast(manifest, urls_end=ends, engine=settings.engine)
    if ends is not None and ends <= datetime.now(UTC):
        return _warned(
            found, "signed URLs have ended; where they are not renewed, get a new listing"
        )
    return found


def _decide(
    settings: Settings, found: Forecast, checkpoints: Sequence[Checkpoint], root: Path
) -> Forecast:
    """Return *found* with what is done with *checkpoints*, whose small files lie below *root*."""
    sharded = any(c.kind in SHARDED for c in checkpoints)
    checkpoints = [_as_made(c) for c in checkpoints]
    adapters = [c for c in checkpoints if c.kind is Kind.ADAPTER]
    others = [c for c in checkpoints if c.kind is not Kind.ADAPTER]
    is_sharded = any(c.kind in SHARDED for c in others)
    found = replace(found, consolidates=sharded, served_is_sharded=is_sharded)
    if refusal := _too_much(settings, adapters, others, root):
        return _warned(found, refusal)
    if not adapters:
        name = settings.base_model if not settings.base_checkpoint else None
        if name and sharded:
            found = _with_base(settings, found, name)
        why = "consolidated first: its weights are sharded over ranks" if sharded else ""
        mode = "as it is" if others else ""
        model = _measured(others[0], found.manifest, root) if len(others) == 1 else None
        return replace(found, mode=mode, why=why or _why_whole(mode), model=model)
    base = settings.base_checkpoint
    if base is not None:
        place = f"{base.job}/{base.name}"
        whole = [c for c in others if c.path.relative_to(root).as_posix() == place]
        model = _measured(whole[0], found.manifest, root) if whole else None
        found = replace(found, model=model)
        name = ""
    else:
        places = {c.path.relative_to(root).as_posix(): c.detail for c in adapters}
        name = settings.base_model or ""
        if not name:
            chosen = named_base({p: d.get("base_model") for p, d in places.items()}, settings)
            name, settings = chosen.name, chosen.over(settings)
        if settings.base_revision is None:
            settings = replace(settings, base_revision=named_revision(places, name))
        found = _with_base(settings, found, name)
    folders = [(c.path.relative_to(root).parts[0], c.path) for c in adapters]
    named = list(name_adapters(folders))
    decision = decide(
        settings.adapter_policy,
        named,
        base_is_fetched=base is not None or is_remote(name),
        by_configs=True,
    )
    if found.model is not None and found.model.config:
        pooled = is_pooled(found.base.folder if found.base else None, settings.engine_args)
        policy, config = settings.adapter_policy, found.model.config
        decision = decide_for_base(decision, policy, named, config, pooled=pooled)
    return replace(found, mode=decision.mode, why=decision.why.partition(": ")[2])


def _as_made(checkpoint: Checkpoint) -> Checkpoint:
    """Return *checkpoint*, an adapter that is sharded over ranks as the one that it becomes."""
    folders = home_folders(checkpoint) if checkpoint.kind in SHARDED else ()
    home = next((f for f in folders if (f / ADAPTER_CONFIG).is_file()), None)
    if home is None:
        return checkpoint
    detail = describe_adapter(read_json(home / ADAPTER_CONFIG))
    return replace(checkpoint, kind=Kind.ADAPTER, path=home, detail=detail)


@dataclass(frozen=True, slots=True)
class Cut:
    """A node's stages, and where headers are read that tell what they hold."""

    stage: Stage
    store: Store
    root: Path


def _cut(
    settings: Settings, found: Forecast, checkpoints: Sequence[Checkpoint], cut: Cut
) -> Forecast:
    """Return *found* with what the node takes, as ``make_ready`` cuts it."""
    if len(checkpoints) != 1 or (share := find_share(checkpoints[0], cut.stage)) is None:
        return found
    folder = checkpoints[0].path.relative_to(cut.root).as_posix()
    manifest = found.manifest
    of_model = [a.path for a in manifest.files if a.path.rpartition("/")[0] == folder]
    weights = [path for path in of_model if path.endswith(".safetensors")]
    if all(manifest.presence.get(path) != "missing" for path in of_model):
        return found  # it is here, and served as it is
    found = replace(found, share=share.text)
    if checkpoints[0].kind in SHARDED:
        return found
    options, timeline = FetchOptions.of(settings), Timeline(quiet=True)
    with Delivery(manifest, cut.root, cut.store, options, timeline) as delivery:
        headers = [delivery.read_header(delivery.root / path) for path in weights]
    tensors = {n: info for header in headers if header for n, info in header.tensors.items()}
    return replace(found, share_bytes=sum(tensors[n].size_bytes for n in share.needed(tensors)))


def _too_much(
    settings: Settings, adapters: Sequence[Checkpoint], others: Sequence[Checkpoint], root: Path
) -> str:
    """Return why a start would not choose among whole models, empty where it need not."""
    base = settings.base_checkpoint
    home = f"{base.job}/{base.name}" if base else ""
    places = [c.path.relative_to(root).as_posix() for c in others if c.kind in WHOLE]
    models = [place for place in places if place != home]
    if len(models) + bool(adapters) < 2 or not models:
        return ""
    told = ", ".join(models[:_TOLD]) + (", …" if len(models) > _TOLD else "")
    beside = " beside adapters" if adapters else ""
    return (
        f"whole models{beside}: {told}; a start serves one alone: say which by --checkpoint, a "
        "pattern or artifact_references"
    )


def _why_whole(mode: str) -> str:
    return "a whole model, which needs nothing done to it" if mode else ""


def _with_base(settings: Settings, found: Forecast, name: str) -> Forecast:
    try:
        base = plan_base(settings, name)
    except LoaderError as error:
        got = f" ({error.got})" if error.got else ""
        told = f"the base {redact(name)} is not in this plan: {error.what}{got}"
        return _warned(found, told)
    found = replace(found, base=base, model=Model(base.config, base.weight_bytes))
    return _warned(found, base.warning) if base.warning else found


def _warned(found: Forecast, warning: str) -> Forecast:
    return replace(found, warnings=(*found.warnings, warning))


def _measured(checkpoint: Checkpoint, manifest: Manifest, root: Path) -> Model:
    """Return what of *checkpoint* decides the room that it takes; its bytes may be an estimate."""
    sharded = checkpoint.kind in SHARDED
    homes = home_folders(checkpoint) if sharded else [checkpoint.path]
    path = next((f / _CONFIG for f in homes if (f / _CONFIG).is_file()), None)
    config = read_json(path) if path else {}
    if not sharded:
        sizes = weights_by_folder(manifest)
        return Model(config, sizes.get(checkpoint.path.relative_to(root).as_posix()))
    held = total_bytes([a for a in (*manifest.files, *manifest.left_out) if is_shard(a.path)])
    counted = count_parameters(config) * dtype_bytes(stored_dtype(config))
    known = [size for size in (held, counted) if size]
    return Model(config, min(known, default=None))


def _listings(manifest: Manifest) -> tuple[Listing, ...]:
    jobs: dict[str, list[Artifact]] = defaultdict(list)
    for artifact in (*manifest.files, *manifest.left_out):
        jobs[artifact.job].append(artifact)
    return tuple(Listing(job, tuple(artifacts)) for job, artifacts in jobs.items())


def _room(settings: Settings, found: Forecast) -> Iterator[Room]:
    """Yield the room on each disk, and what the engine will want."""
    writes: list[tuple[Path, int, str]] = []
    missing = [a for a in found.manifest.files if found.manifest.presence.get(a.path) == "missing"]
    down = sum(a.size_bytes or 0 for a in missing)
    if found.share_bytes is not None:
        down = sum(a.size_bytes or 0 for a in missing if not a.path.endswith(".safetensors"))
    writes.append((settings.training.download_folder, down, "fetched"))
    cache = cache_folder(settings)
    if found.base is not None and found.base.folder is not None:
        size = sum(file.size_bytes or 0 for file in found.base.missing)
        writes.append((found.base.folder, size, "fetched for the base"))
    if found.share_bytes is not None:
        writes.append((cache, found.share_bytes, "of this node's share"))
    weights = found.model.bytes if found.model else None
    if weights and found.consolidates:
        size = weights
        if settings.consolidate_dtype and found.model:
            stored = dtype_bytes(stored_dtype(found.model.config))
            size = weights * dtype_bytes(settings.consolidate_dtype) // stored
        writes.append((cache, size, "consolidated, about"))
    if weights and found.mode == "merge":
        writes.append((cache, weights, "merged"))
    yield from _disks(writes)
    if weights and found.model:
        served = served_bytes(found.model.config, weights, settings.engine_args.get("dtype"))
        yield from engine_room(settings.engine, settings.engine_args, served, read_machine())


def _disks(writes: Sequence[tuple[Path, int, str]]) -> Iterator[Room]:
    """Yield what is written to each file system together, and what is free there."""
    on: dict[int, list[tuple[Path, int, str]]] = defaultdict(list)
    for folder, size, what in writes:
        there = existing(folder)
        if size or not on:
            on[there.stat().st_dev].append((there, size, what))
    for rows in on.values():
        parts = ", ".join(f"{what} {show_bytes(size)}" for _, size, what in rows if size)
        needed = sum(size for _, size, _ in rows)
        free = shutil.disk_usage(rows[0][0]).free
        why = parts or "nothing is written"
        yield Room("disk", needed, free, why, folder=rows[0][0])


def existing(folder: Path) -> Path:
    """Return *folder*, or the first above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
