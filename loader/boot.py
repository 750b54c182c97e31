"""The main job: settings -> manifest -> snapshot -> checkpoints -> ReadyModel -> engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loader.config.settings import Settings
from loader.config.values import user_path
from loader.errors import LoaderError, redact
from loader.fetch.adoption import adopt, presence
from loader.fetch.completed import write_completed
from loader.fetch.files import is_case_sensitive
from loader.fetch.progress import Progress
from loader.fetch.sizes import ask_sizes
from loader.fetch.snapshot import FetchOptions, fetch, read_artifact
from loader.fetch.spans import SpanProgress
from loader.peers import beside_peers, serve_peers_on
from loader.prepare.artifact_sources import (
    Origin,
    completed_before,
    completed_key,
    open_origin,
    place_downloads,
    wanted_checkpoints,
)
from loader.resolve.manifest import check_index, resolve
from loader.threads import map_on_threads
from loader.timeline import Timeline
from loader.types import Artifact, Manifest, ReadyModel, Snapshot

if TYPE_CHECKING:
    from loader.adapters.layers import Ask
    from loader.arriving.filling import Announce
    from loader.prepare.forecast import Forecast
    from loader.serve.early_imports import EarlyImports
    from loader.serve.model import ServedModel
    from loader.serve.vllm.kernel_cache import KernelCache
    from loader.serve.vllm.streamed_start import StreamedStart

_log = logging.getLogger("podloader")
_INDEXES = (".safetensors.index.json", ".bin.index.json")
_TOO_LITTLE = "this may be too little: %s"
_AT_ONCE = 8  # requests for indexes
_MOST_SIZES = 5_000  # more are not asked for one by one by ``plan``


def prepare(
    settings: Settings,
    progress: Progress | None = None,
    timeline: Timeline | None = None,
    ask: Ask | None = None,
    announce: Announce | None = None,
) -> ReadyModel:
    """Return what an engine needs, on this disk. A second call finds what the first left.

    *ask* is the engine's word on adapters; without, one is started to say it, where it takes that.
    *announce* is told of a model whose weights are on their way, as soon as all else is here.

    Raises:
        LoaderError: see ``loader.errors``.
    """
    timeline = timeline or Timeline()
    timeline.note(**_asked_for(settings))
    ready = _prepare(settings, progress, timeline, ask, announce)
    from loader.serve.model import base_name  # the first request is ahead of these
    from loader.serve.vllm.releases import installed_versions

    names = [adapter.name for adapter in ready.adapters]
    timeline.note(
        model=str(ready.path),
        adapters=names,
        served_as=[base_name(ready, settings.served_model_name), *names],
        versions=installed_versions(),
    )
    return ready


def _prepare(
    settings: Settings,
    progress: Progress | None,
    timeline: Timeline,
    ask: Ask | None,
    announce: Announce | None,
) -> ReadyModel:
    from loader.arriving.delivery import Delivery
    from loader.prepare.fits import check_fits, check_small
    from loader.prepare.ready import make_ready
    from loader.prepare.wholeness import WholenessCheck  # fetch and plan do without these

    settings, laid = place_downloads(settings)
    root = settings.training.download_folder
    with open_origin(settings, laid, timeline, progress) as origin:
        manifest, indexed = _resolved(settings, origin, progress, timeline)
        warnings = check_fits(settings, manifest, origin.store, indexed)
        for warning in warnings:
            _log.warning(_TOO_LITTLE, warning)
        store, options = beside_peers(settings, origin.store, root, FetchOptions.of(settings))
        with Delivery(manifest, root, store, options, timeline, progress) as delivery:
            # An engine that says what it has layers for imports in a process of its own, not here.
            ahead = ask is not None and not delivery.is_whole
            try:
                with WholenessCheck(timeline, settings, ahead=ahead) as check:
                    ready = make_ready(settings, delivery, check, ask, announce)
            finally:
                if delivery.is_whole:
                    write_completed(root, completed_key(settings), manifest)
    for warning in () if warnings else check_small(settings, str(ready.path)):
        _log.warning(_TOO_LITTLE, warning)
    return ready


def prepare_beside_imports(
    settings: Settings, progress: Progress, timeline: Timeline
) -> ReadyModel:
    """Return what ``prepare`` does, with the engine imported in this process meanwhile.

    Raises:
        LoaderError: see ``loader.errors``.
    """
    imports = _early_imports(settings, progress, timeline)
    ready = prepare(settings, imports, timeline)
    imports.wait()
    return ready


def prepare_and_start(
    settings: Settings, progress: Progress, timeline: Timeline
) -> tuple[ReadyModel, ServedModel]:
    """Return what ``prepare`` and ``start`` do, with the engine in this process.

    It is imported while the files arrive; vLLM loads weights meanwhile, where they are streamed.

    Raises:
        LoaderError: see ``loader.errors``.
    """
    kernels = _kernel_cache(settings, timeline)
    imports = _early_imports(settings, progress, timeline, kernels)

    def begin(ready: ReadyModel, load_format: str | None = None) -> ServedModel:
        from loader.prepare.consolidated import cache_folder

        imports.wait()
        given = ready if load_format else kernels.lead(ready, cache_folder(settings))
        return start(given, settings, timeline, load_format=load_format)

    streamed = _streamed_start(settings, begin, timeline)
    try:
        announce = streamed.announce if streamed is not None else None
        ready = prepare(settings, imports, timeline, announce=announce)
        imports.wait()
    except BaseException as error:
        if streamed is not None:
            streamed.abort(error)
        raise
    model = streamed.finish(ready) if streamed is not None else begin(ready)
    kernels.publish()
    return ready, model


def _kernel_cache(settings: Settings, timeline: Timeline) -> KernelCache:
    """Return what brings compiled kernels, which has begun; before vLLM is imported."""
    from loader.serve.vllm.arguments import written
    from loader.serve.vllm.kernel_cache import KernelCache

    kernels = KernelCache(settings, written(settings.engine_args), timeline)
    os.environ.update(kernels.environment)
    kernels.begin()
    return kernels


def _early_imports(
    settings: Settings, progress: Progress, timeline: Timeline, kernels: KernelCache | None = None
) -> EarlyImports:
    from loader.serve.early_imports import CONFIG, EarlyImports

    folder, wait = settings.training.download_folder, kernels.wait if kernels else lambda: None
    imports = EarlyImports(settings.engine, folder, timeline, progress, wait)
    if settings.base_model and not settings.base_checkpoint:
        imports.look_at(user_path(settings.base_model) / CONFIG)
    return imports


def _streamed_start(
    settings: Settings,
    begin: Callable[[ReadyModel, str | None], ServedModel],
    timeline: Timeline,
) -> StreamedStart | None:
    """Return what loads weights as they arrive; None where files are waited for."""
    if settings.engine != "vllm":
        return None
    from loader.prepare.consolidated import cache_folder
    from loader.serve.vllm.streamed_start import StreamedStart
    from loader.serve.vllm.streaming import why_not_streamed

    if why := why_not_streamed(settings.engine_start, settings.engine_args):
        _log.info("engine start: files: %s", why)
        return None
    return StreamedStart(cache_folder(settings), settings.served_model_name, begin, timeline)


def start(
    ready: ReadyModel,
    settings: Settings,
    timeline: Timeline | None = None,
    *,
    load_format: str | None = None,
) -> ServedModel:
    """Return an engine that answers. *load_format* is vLLM's.

    Raises:
        EngineError: it did not start.
        ConfigError: ``engine_args`` that it does not know.
        AdapterError: an adapter that changes nothing in it.
    """
    make: Callable[..., ServedModel]
    if settings.engine == "vllm":
        from loader.serve.vllm.inprocess import VLLMModel

        make = partial(VLLMModel, load_format=load_format)
    else:
        from loader.serve.transformers import TransformersModel

        make = TransformersModel
    model = make(
        ready,
        engine_args=settings.engine_args,
        served_model_name=settings.served_model_name,
        trust_remote_code=settings.trust_remote_code,
        canary=settings.canary,
    )
    with (timeline or Timeline()).stage("engine start"):
        model.load()
    serve_peers_on(settings)
    return model


def fetch_files(
    settings: Settings, progress: Progress | None = None, timeline: Timeline | None = None
) -> Snapshot:
    """Return the files that the config asks for, whole, below its download folder."""
    timeline = timeline or Timeline()
    settings, laid = place_downloads(settings)
    root = settings.training.download_folder
    with open_origin(settings, laid, timeline, progress) as origin:
        manifest, _ = _resolved(settings, origin, progress, timeline)
        options = FetchOptions.of(settings)
        store, options = beside_peers(settings, origin.store, root, options)
        with SpanProgress(progress, timeline) as watched:
            snapshot = fetch(manifest, root, store, options, watched)
        write_completed(root, completed_key(settings), manifest)
    serve_peers_on(settings)
    return snapshot


def plan(settings: Settings, *, with_sizes: bool = True) -> Manifest:
    """Return what would be fetched; with sizes where the origin tells them."""
    settings, laid = place_downloads(settings)
    with open_origin(settings, laid, Timeline(quiet=True)) as origin:
        return _planned(settings, origin, with_sizes)


def look_ahead(
    settings: Settings, progress: Progress | None = None, *, with_sizes: bool = True
) -> Forecast:
    """Return what a start would do and take; without sizes, nothing is asked but the listings."""
    settings, laid = place_downloads(settings)
    with open_origin(settings, laid, Timeline(quiet=True), progress) as origin:
        manifest = _planned(settings, origin, with_sizes, progress)
        from loader.prepare.forecast import begin, forecast

        if not with_sizes:
            return begin(settings, manifest)
        return forecast(settings, manifest, origin.store, progress)


def _planned(
    settings: Settings, origin: Origin, with_sizes: bool, progress: Progress | None = None
) -> Manifest:
    root = settings.training.download_folder
    manifest = _leave_out(settings, resolve(wanted_checkpoints(settings), origin.listings))
    manifest = replace(manifest, presence=presence(manifest, root, origin.laid))
    if with_sizes:
        asked = (*manifest.files, *manifest.left_out)
        unknown = sum(1 for artifact in asked if artifact.size_bytes is None)
        told: tuple[str, ...] = ()
        is_silent = False
        if unknown > _MOST_SIZES:
            reason = f"the listing lacks {unknown} of them, too many to ask for one by one"
            told = (f"sizes are unknown: {reason}",)
        elif unknown:
            with (progress or Progress()).step("sizes") as tell:
                manifest = ask_sizes(manifest, origin.store, settings.concurrency, tell)
            is_silent = any(artifact.size_bytes is None for artifact in manifest.files)
        if not is_silent:
            from loader.prepare.remote import warn_of_ids  # the first request is ahead of it

            told += tuple(warn_of_ids(manifest, origin.store, root))
        manifest = replace(manifest, warnings=(*manifest.warnings, *told))
    return manifest


def _resolved(
    settings: Settings, origin: Origin, progress: Progress | None, timeline: Timeline
) -> tuple[Manifest, Mapping[str, int]]:
    """Return the files that are wanted; those that lie here already are taken.

    With them what indexes say: the bytes of the weights in their folders.
    """
    root, options = settings.training.download_folder, FetchOptions.of(settings)

    def adopt_files(manifest: Manifest) -> None:
        try:
            adopt(manifest, root, origin.laid, origin.store, options, progress, timeline)
        except LoaderError as error:
            completed_before(settings, error)

    with timeline.stage("resolve"):
        sensitive = is_case_sensitive(root)
        manifest = resolve(wanted_checkpoints(settings), origin.listings, case_sensitive=sensitive)
        manifest = _leave_out(settings, manifest)
        from loader.fetch.sum_manifests import declare_sums  # the first request is ahead of it
        from loader.resolve.sum_files import find_sum_files

        indexes = tuple(a for a in manifest.files if a.name.endswith(_INDEXES))
        listed = [artifact for listing in origin.listings for artifact in listing.artifacts]
        # Their origin may not give them any more.
        adopt_files(Manifest((*indexes, *find_sum_files(listed, manifest.files))))
        indexed = _check_indexes(indexes, root, origin, progress or Progress())
        files = declare_sums(manifest.files, listed, root, origin.store)
        manifest = replace(manifest, files=files)
    adopt_files(manifest)
    timeline.note(bytes_from=_origins(manifest))
    return manifest, indexed


def _asked_for(settings: Settings) -> dict[str, object]:
    """Return what the settings ask for, as a start tells of itself."""
    references = settings.training.artifact_references
    return {
        "checkpoints": [
            f"{one.training_job_id}/{path}" for one in references for path in one.paths
        ],
        "base_model": redact(settings.base_model or ""),
        "artifacts": [redact(source) for source in settings.artifacts],
    }


def _origins(manifest: Manifest) -> list[str]:
    """Return where the bytes come from, such as ``https://bucket.s3.amazonaws.com``."""
    return sorted(map(redact, {"/".join(file.url.split("/", 3)[:3]) for file in manifest.files}))


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


def _check_indexes(
    indexes: Sequence[Artifact], root: Path, origin: Origin, progress: Progress
) -> Mapping[str, int]:
    """Read every index among the files and refuse holes, before anything large is fetched.

    Returns the bytes of the weights in each one's folder, where it says them.
    """
    if not indexes:
        return {}
    from loader.weights.index import indexed_bytes, shard_names

    listed = {artifact.path for listing in origin.listings for artifact in listing.artifacts}
    found = {}
    with progress.step("indexes"):
        texts = map_on_threads(
            lambda artifact: read_artifact(artifact, root, origin.store), indexes, _AT_ONCE
        )
    for artifact, text in zip(indexes, texts, strict=True):
        check_index(artifact.job, artifact.name, shard_names(text, artifact.path), listed)
        if size := indexed_bytes(text):
            found[artifact.path.rpartition("/")[0]] = size
    return found
