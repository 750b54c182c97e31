"""The main job: settings -> manifest -> snapshot -> checkpoints -> ReadyModel -> engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loader.config.settings import Settings
from loader.errors import ConfigError
from loader.fetch.files import is_case_sensitive
from loader.fetch.progress import Progress
from loader.fetch.sizes import ask_sizes
from loader.fetch.snapshot import FetchOptions, fetch, read_artifact
from loader.fetch.spans import SpanProgress
from loader.resolve.manifest import check_index, resolve
from loader.stores.registry import Stores
from loader.timeline import Timeline
from loader.types import (
    ArtifactReference,
    Listing,
    Manifest,
    ReadyModel,
    Snapshot,
    TrainingCheckpoints,
)

if TYPE_CHECKING:
    from loader.serve.model import ServedModel

_INDEXES = (".safetensors.index.json", ".bin.index.json")
_MOST_SIZES = 5_000  # more are not asked for one by one by ``plan``


@dataclass(frozen=True, slots=True)
class Origin:
    """The listings of every job, and the store that holds their artifacts."""

    listings: tuple[Listing, ...]
    store: Stores


def prepare(
    settings: Settings, progress: Progress | None = None, timeline: Timeline | None = None
) -> ReadyModel:
    """Return what an engine needs, on this disk. A second call finds what the first left.

    Raises:
        LoaderError: see ``loader.errors``.
    """
    from loader.fetch.background import SplitFetch
    from loader.prepare.overlap import find_late, prepare_while_fetching
    from loader.prepare.ready import make_ready  # fetch and plan do without these
    from loader.prepare.shards import find_shards, prepare_from_shards
    from loader.weights.inspect import find_checkpoints

    timeline = timeline or Timeline()
    root = settings.training.download_folder
    options = FetchOptions.of(settings)
    with open_origin(settings, timeline) as origin:
        manifest = _resolved(settings, origin, timeline)
        if late := find_late(settings, manifest):
            parts = SplitFetch.split(manifest, late, root, origin.store, options, progress)
            return prepare_while_fetching(settings, parts, timeline)
        if shards := find_shards(settings, manifest):
            parts = SplitFetch.split(manifest, shards, root, origin.store, options, progress)
            return prepare_from_shards(settings, parts, timeline)
        with SpanProgress(progress, timeline) as watched:
            snapshot = fetch(manifest, root, origin.store, options, watched)
    with timeline.stage("inspect"):
        checkpoints = find_checkpoints(snapshot.root, [file.path for file in snapshot.files])
    return make_ready(settings, snapshot, checkpoints, timeline, progress=progress)


def prepare_beside_imports(
    settings: Settings, progress: Progress, timeline: Timeline
) -> ReadyModel:
    """Return what ``prepare`` does, with the engine imported in this process meanwhile.

    Raises:
        LoaderError: see ``loader.errors``.
    """
    from loader.serve.early_imports import CONFIG, EarlyImports

    folder = settings.training.download_folder
    imports = EarlyImports(settings.engine, folder, timeline, progress)
    if settings.base_model and not settings.base_checkpoint:
        imports.look_at(Path(settings.base_model).expanduser() / CONFIG)
    ready = prepare(settings, imports, timeline)
    imports.wait()
    return ready


def start(ready: ReadyModel, settings: Settings, timeline: Timeline | None = None) -> ServedModel:
    """Return an engine that answers.

    Raises:
        EngineError: it did not start.
        ConfigError: ``engine_args`` that it does not know.
        AdapterError: an adapter that changes nothing in it.
    """
    model: ServedModel
    if settings.engine == "vllm":
        from loader.serve.vllm.inprocess import VLLMModel as Model
    else:
        from loader.serve.transformers import TransformersModel as Model  # type: ignore[assignment]
    model = Model(
        ready,
        engine_args=settings.engine_args,
        served_model_name=settings.served_model_name,
        trust_remote_code=settings.trust_remote_code,
        canary=settings.canary,
    )
    with (timeline or Timeline()).stage("engine start"):
        model.load()
    return model


def fetch_files(
    settings: Settings, progress: Progress | None = None, timeline: Timeline | None = None
) -> Snapshot:
    """Return the files that the config asks for, whole, below its download folder."""
    timeline = timeline or Timeline()
    root = settings.training.download_folder
    with open_origin(settings, timeline) as origin:
        manifest = _resolved(settings, origin, timeline)
        with SpanProgress(progress, timeline) as watched:
            return fetch(manifest, root, origin.store, FetchOptions.of(settings), watched)


def plan(settings: Settings, *, with_sizes: bool = True) -> Manifest:
    """Return what would be fetched; with sizes where the origin tells them."""
    with open_origin(settings, Timeline(quiet=True)) as origin:
        manifest = _leave_out(settings, resolve(_wanted(settings), origin.listings))
        asked = (*manifest.files, *manifest.left_out)
        unknown = sum(1 for artifact in asked if artifact.size_bytes is None)
        if not with_sizes or not unknown:
            return manifest
        if unknown <= _MOST_SIZES:
            return ask_sizes(manifest, origin.store, settings.concurrency)
        reason = f"the listing lacks {unknown} of them, too many to ask for one by one"
        return replace(manifest, warnings=(*manifest.warnings, f"sizes are unknown: {reason}"))


@contextlib.contextmanager
def open_origin(settings: Settings, timeline: Timeline) -> Iterator[Origin]:
    """Give the listings and the store that the settings name, for the length of the block."""
    if not settings.artifacts:
        raise ConfigError(
            "it is not said where the artifacts are",
            expected="a listing JSON (path or URL), s3://bucket/prefix, baseten, or an fsspec URL",
            next_step="give --artifacts SRC, or set artifacts in model_metadata.podloader",
        )
    references = _wanted(settings).artifact_references
    jobs = tuple(dict.fromkeys(reference.training_job_id for reference in references))
    loops = {reference.training_job_id for reference in references if reference.loops}
    store = Stores(settings, on_renewal=lambda: timeline.count("refreshes"))
    try:
        with timeline.stage("listing"):
            read = [store.read_listings(src, jobs, loops=loops) for src in settings.artifacts]
        yield Origin(tuple(listing for listings in read for listing in listings), store)
    finally:
        store.close()


def _resolved(settings: Settings, origin: Origin, timeline: Timeline) -> Manifest:
    with timeline.stage("resolve"):
        sensitive = is_case_sensitive(settings.training.download_folder)
        manifest = resolve(_wanted(settings), origin.listings, case_sensitive=sensitive)
        manifest = _leave_out(settings, manifest)
        _check_indexes(settings, manifest, origin)
        from loader.fetch.sum_manifests import declare_sums  # the first request is ahead of it

        listed = (artifact for listing in origin.listings for artifact in listing.artifacts)
        root = settings.training.download_folder
        return replace(manifest, files=declare_sums(manifest.files, listed, root, origin.store))


def _leave_out(settings: Settings, manifest: Manifest) -> Manifest:
    """Return *manifest* without what serving will not use, where the settings ask for that."""
    if not settings.weights_only_fetch:
        return manifest
    from loader.weights.formats.serving import serving_files

    needed = serving_files(
        (artifact.path for artifact in manifest.files),
        partitions=settings.consolidate_dtype is not None,
    )
    return replace(
        manifest,
        files=tuple(a for a in manifest.files if a.path in needed),
        left_out=tuple(a for a in manifest.files if a.path not in needed),
    )


def _wanted(settings: Settings) -> TrainingCheckpoints:
    """Return the config's references, and the base model's where it is a checkpoint too."""
    base = settings.base_checkpoint
    if base is None:
        return settings.training
    reference = ArtifactReference(base.job, (f"{base.name}/",))
    references = (*settings.training.artifact_references, reference)
    return replace(settings.training, artifact_references=references)


def _check_indexes(settings: Settings, manifest: Manifest, origin: Origin) -> None:
    """Read every index among the files and refuse holes, before anything large is fetched."""
    indexes = [artifact for artifact in manifest.files if artifact.name.endswith(_INDEXES)]
    if not indexes:
        return
    from loader.weights.index import shard_names

    listed = {artifact.path for listing in origin.listings for artifact in listing.artifacts}
    for artifact in indexes:
        text = read_artifact(artifact, settings.training.download_folder, origin.store)
        names = shard_names(text, artifact.path)
        check_index(artifact.job, artifact.name, names, listed)
