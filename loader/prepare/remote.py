"""What is a checkpoint that was not downloaded: its names, and the few small files that tell."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loader.config.settings import Settings
from loader.errors import ListingError, LoaderError, redact
from loader.fetch.snapshot import read_artifact
from loader.json_text import parse_json
from loader.resolve.manifest import NO_FILES, check_count, check_names
from loader.stores.base import Progress, Store, count_up
from loader.stores.registry import Stores, is_remote
from loader.threads import map_on_threads
from loader.types import Artifact, Checkpoint, Listing, Manifest
from loader.weights.frameworks import TRACKER
from loader.weights.inspect import find_checkpoints, open_checkpoint
from loader.weights.publishing import temporary_folder
from loader.weights.vocabulary import describe_ids

CONFIG = "config.json"
ADDED_TOKENS = ("tokenizer_config.json", "added_tokens.json")
_PARTS = (CONFIG, ".index.json", ".safetensors", ".bin", ".pt", ".pth", ".distcp", ".metadata")
_AT_ONCE = 8  # requests for small files
_TELLING = ("/config.json", "/adapter_config.json", ".index.json", "/latest", f"/{TRACKER}")


def inspect_source(
    source: str, settings: Settings | None = None, progress: Progress | None = None
) -> tuple[Checkpoint, ...]:
    """Return the checkpoints in a folder, or behind a listing or another source of artifacts.

    Of a source, only small files that tell the kind are read; paths are ``<job>/rank-<N>/…``.

    Raises:
        CheckpointError: there is no such folder.
        ListingError: not a listing.
        FetchError: the source refuses or does not answer.
        FormatError: a config or an index is malformed.
    """
    path = Path(source)
    if not is_remote(source) and path.is_file() and _is_part(path):
        path = path.parent
        source = str(path)
    if not is_remote(source) and not path.is_file():
        found = find_checkpoints(path) if path.is_dir() else ()
        return found or (open_checkpoint(path),)
    store = Stores(settings or Settings.without_config(), progress=progress)
    try:
        listings = store.read_listings(source)
        if not any(listing.artifacts for listing in listings):
            raise ListingError(
                "the listing is empty",
                where=redact(source),
                expected="files of a checkpoint",
                next_step=NO_FILES,
            )
        for listing in listings:
            check_count(listing)
            check_names(listing.artifacts)
        with temporary_folder() as root:
            found = read_checkpoints(listings, store, root, progress)
            return tuple(replace(c, path=c.path.relative_to(root)) for c in found)
    finally:
        store.close()


def _is_part(path: Path) -> bool:
    """Return whether a file is one of a checkpoint's, by its name; listings have other names."""
    return path.name.endswith(_PARTS)


def read_checkpoints(
    listings: Sequence[Listing], store: Store, root: Path, progress: Progress | None = None
) -> tuple[Checkpoint, ...]:
    """Return the checkpoints behind *listings*, their small telling files put below *root*.

    Raises:
        FetchError: one of these files cannot be read.
        FormatError: a config or an index is malformed.
    """
    listed = [artifact for listing in listings for artifact in listing.artifacts]
    telling = [artifact for artifact in listed if artifact.name.endswith(_TELLING)]
    with (progress or Progress()).step("small files") as tell:
        count = count_up(tell, f"of {len(telling):,}")

        def put(artifact: Artifact) -> None:
            _put(artifact, root, store)
            count(1)

        map_on_threads(put, telling, _AT_ONCE)
        return find_checkpoints(root, [artifact.path for artifact in listed])


def warn_of_ids(manifest: Manifest, store: Store, root: Path) -> list[str]:
    """Return a warning for each model whose tokenizer's added tokens have no row in it.

    Of a model in *manifest* only small files are read; one that cannot be is left out.
    """
    folders: dict[str, dict[str, Artifact]] = {}
    for artifact in manifest.files:
        folder, _, name = artifact.path.rpartition("/")
        folders.setdefault(folder, {})[name] = artifact

    def warn(folder: str) -> str:
        files = folders[folder]
        names = [name for name in ADDED_TOKENS if name in files]
        if names and CONFIG in files:
            with contextlib.suppress(LoaderError, ValueError):
                read = {n: parse_json(read_artifact(files[n], root, store)) for n in names}
                config = parse_json(read_artifact(files[CONFIG], root, store))
                if warning := describe_ids(read, config):
                    return f"{folder}: {warning}"
        return ""

    return list(filter(None, map_on_threads(warn, list(folders), _AT_ONCE)))


def _put(artifact: Artifact, root: Path, store: Store) -> None:
    text = read_artifact(artifact, root, store)
    place = root / artifact.path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(text)
