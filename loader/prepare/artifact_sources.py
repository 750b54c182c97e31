"""Where the artifacts of a config are: at an origin, in the download folder already, or both."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loader.config.paths import tell_names
from loader.config.settings import COMMAND_LINE, Settings
from loader.errors import ConfigError, ListingError, LoaderError, redact
from loader.fetch.adoption import LaidFiles
from loader.fetch.completed import read_completed
from loader.stores.base import Progress
from loader.stores.laid_files import has_ranks
from loader.stores.registry import LOCAL, Stores
from loader.timeline import Timeline
from loader.types import ArtifactReference, Listing, TrainingCheckpoints

_log = logging.getLogger("podloader")


@dataclass(frozen=True, slots=True)
class Origin:
    """The listings of every job, the store that holds their artifacts, and what lies here."""

    listings: tuple[Listing, ...]
    store: Stores
    laid: LaidFiles


def place_downloads(settings: Settings) -> tuple[Settings, LaidFiles]:
    """Return the settings with a download folder to write to, and what may lie in their own.

    Where that is read-only, as a mounted volume is, files of it are taken by symlinks in a folder
    of the cache, and what it lacks is fetched there.
    """
    folder = settings.training.download_folder.absolute()
    jobs = _jobs(settings)
    flat_job = jobs[0] if len(jobs) == 1 and has_ranks(folder) else None
    laid = LaidFiles(folder, flat_job, tuple(map(Path, settings.trusted_folders)))
    if not folder.is_dir() or os.access(folder, os.W_OK):
        return settings, laid
    cache = settings.user_cache
    made = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    if not os.access(made, os.W_OK):  # what is here has to be enough
        return settings, laid
    key = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    training = replace(settings.training, download_folder=cache / "downloads" / key)
    return replace(settings, training=training), laid


@contextlib.contextmanager
def open_origin(
    settings: Settings, laid: LaidFiles, timeline: Timeline, progress: Progress | None = None
) -> Iterator[Origin]:
    """Give the listings and the store that the settings name, for the length of the block.

    Where no artifacts are named, what lies in the download folder is the listing. A place that does
    not answer is done without where an earlier run has completed all that this config asks for.

    Raises:
        ConfigError: no artifacts are named, and none lie there.
        ListingError, FetchError: a listing cannot be read.
    """
    store = Stores(settings, lambda: timeline.count("refreshes"), progress)
    try:
        with timeline.stage("listing"):
            try:
                listings = _read_listings(settings, store, laid)
            except LoaderError as error:
                listings = completed_before(settings, error)
        yield Origin(listings, store, laid)
    finally:
        store.close()


def completed_before(settings: Settings, error: LoaderError) -> tuple[Listing, ...]:
    """Return the listings of what an earlier run completed, where *error* is an origin's silence.

    Raises:
        LoaderError: *error*, where it is another, or not all that this config asks for is here.
    """
    root, key = settings.training.download_folder, completed_key(settings)
    completed = read_completed(root, key) if error.retryable else ()
    if not completed:
        raise error
    _log.warning("%s; an earlier run completed all files, which are taken", error.what)
    return completed


def _read_listings(settings: Settings, store: Stores, laid: LaidFiles) -> tuple[Listing, ...]:
    references = wanted_checkpoints(settings).artifact_references
    jobs = _jobs(settings)
    loops = {reference.training_job_id for reference in references if reference.loops}
    found: list[Listing] = []
    for source in settings.artifacts:
        if source != LOCAL:
            try:
                found += store.read_listings(source, jobs, loops=loops)
            except LoaderError as error:
                origin = settings.origins.get("artifacts", COMMAND_LINE)
                if origin != COMMAND_LINE:
                    error.problems += (f"it is named by artifacts, from {origin}",)
                raise
    if not settings.artifacts or LOCAL in settings.artifacts:
        found += _only_here(store.read_download_folder(laid.folder, jobs), found)
    if not found and not settings.artifacts:
        raise ConfigError(
            "it is not said where the artifacts are",
            expected="a listing JSON (path or URL), s3://bucket/prefix, baseten, an fsspec URL, "
            f"or the files themselves in {laid.folder}/<job>/rank-<N>/",
            got=tell_names(laid.folder),
            next_step="give --artifacts SRC, or set artifacts in model_metadata.podloader",
        )
    if not found and LOCAL in settings.artifacts:
        raise ListingError(
            "nothing of the jobs lies in the download folder",
            where=str(laid.folder),
            expected=", ".join(f"{job}/rank-<N>/…" for job in jobs),
            got=tell_names(laid.folder),
            next_step="lay the files there, or name an origin in artifacts",
        )
    return tuple(found)


def _only_here(here: Sequence[Listing], origins: Sequence[Listing]) -> Iterator[Listing]:
    """Yield the files of *here* that none of *origins* has: those are compared with it."""
    listed = {artifact.path for listing in origins for artifact in listing.artifacts}
    for listing in here:
        yield replace(
            listing, artifacts=tuple(a for a in listing.artifacts if a.path not in listed)
        )


def _jobs(settings: Settings) -> tuple[str, ...]:
    references = wanted_checkpoints(settings).artifact_references
    return tuple(dict.fromkeys(reference.training_job_id for reference in references))


def completed_key(settings: Settings) -> str:
    """Return what tells this config's choice of files from others'."""
    references = [
        (r.training_job_id, r.paths) for r in wanted_checkpoints(settings).artifact_references
    ]
    sources = [redact(source) for source in settings.artifacts]
    text = json.dumps([references, sources, settings.weights_only_fetch])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def wanted_checkpoints(settings: Settings) -> TrainingCheckpoints:
    """Return the config's references, and the base model's where it is a checkpoint too."""
    base = settings.base_checkpoint
    if base is None:
        return settings.training
    reference = ArtifactReference(base.job, (f"{base.name}/",))
    references = (*settings.training.artifact_references, reference)
    return replace(settings.training, artifact_references=references)
