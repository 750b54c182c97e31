"""A base model behind a URL -> a folder on this disk.

::

    <cache folder>/bases/<name>-<digest of the URL>/rank-0/…     the files that an engine needs

The cache folder is ``.podloader/models`` of the download folder where none is set.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from loader.errors import FetchError, redact
from loader.fetch.files import STATE
from loader.fetch.snapshot import FetchOptions, fetch
from loader.resolve.manifest import check_names
from loader.settings import Settings
from loader.sources import BaseModel
from loader.stores.model_files import side_files, weight_files
from loader.stores.sources import Stores
from loader.types import JOB_ID, Manifest


def fetch_base(settings: Settings, url: str, *, weights: bool = True) -> BaseModel:
    """Return the model in the folder at *url*, such as ``s3://bucket/model``; *weights* if wanted.

    Raises:
        ConfigError: no such sort of place, or a package or credentials are missing.
        FetchError: it cannot be fetched, or has no weights.
    """
    root = (settings.cache_folder or settings.training.download_folder / STATE / "models") / "bases"
    last = url.rstrip("/").rpartition("/")[2]
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:12]
    name = f"{last if JOB_ID.fullmatch(last) else 'base'}-{digest}"
    stores = Stores(settings)
    try:
        listing = stores.read_folder(url, name)
        names = [artifact.relative_file_name for artifact in listing.artifacts]
        chosen = set(side_files(names))
        if weights:
            wanted = weight_files(names, allow_pickle=settings.allow_pickle)
            if not wanted:
                raise FetchError(
                    "the base model has no safetensors weights",
                    where=url,
                    got=", ".join(sorted(names)[:10]),
                    next_step="give the folder that save_pretrained wrote, or set allow_pickle to "
                    "read .bin files",
                )
            chosen |= set(wanted)
        files = [a for a in listing.artifacts if a.relative_file_name in chosen]
        check_names(files)
        manifest = Manifest(tuple(sorted(files, key=lambda a: a.path)))
        snapshot = fetch(manifest, root, stores, _options(settings))
    finally:
        stores.close()
    digests = {file.path.partition("/rank-0/")[2]: file.digest for file in snapshot.files}
    return BaseModel(snapshot.root / name / "rank-0", {"url": redact(url), "files": digests})


def _options(settings: Settings) -> FetchOptions:
    return replace(
        FetchOptions(),
        concurrency=settings.concurrency,
        retries=settings.retries,
        range_bytes=int(settings.range_size),
        verify=settings.verify,
    )
