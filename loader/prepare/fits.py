"""Whether a model can fit this machine, before its download: by sizes, and by as little as that."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping

from loader.config.settings import Settings
from loader.errors import EngineError
from loader.fetch.snapshot import read_artifact
from loader.json_text import parse_json
from loader.stores.base import Store
from loader.stores.model_files import weight_files
from loader.types import Manifest

_CONFIG = "config.json"
_SMALL_BYTES = 2 * 10**9  # for which every machine with a GPU has room; it is not looked at


def check_fits(
    settings: Settings, manifest: Manifest, store: Store, indexed: Mapping[str, int]
) -> tuple[str, ...]:
    """Return what may be too little for the engine, known before the download of *manifest*.

    By the sizes of a listing, or what an index says of its folder (*indexed*, bytes by path). The
    config of a model is read where its files are larger than what there is room for: served, they
    may be smaller.

    Raises:
        EngineError: the model does not fit this machine.
    """
    warned: list[str] = []
    for folder, size in {**weights_by_folder(manifest), **indexed}.items():
        try:
            short = check_size(settings, size, folder)
        except EngineError:
            short = check_size(
                settings, _least_served(settings, manifest, store, folder, size), folder
            )
        warned += short
    return tuple(dict.fromkeys(warned))


def check_size(settings: Settings, weight_bytes: int, where: str) -> tuple[str, ...]:
    """Return what may be too little for weights of *weight_bytes*, as they are served.

    Raises:
        EngineError: the model at *where* does not fit this machine.
    """
    workers = settings.engine_args.get("tensor_parallel_size", 1)
    if weight_bytes < _SMALL_BYTES and workers == 1:
        return ()
    from loader.serve.room import check_engine_room  # the first request is ahead of it

    return check_engine_room(settings.engine, settings.engine_args, weight_bytes, where)


def check_small(settings: Settings, where: str) -> tuple[str, ...]:
    """Return what may be too little, whatever the weights: for those that were not looked at.

    Raises:
        EngineError: as ``check_size``.
    """
    from loader.serve.room import check_engine_room
    from loader.serve.vllm.releases import is_cpu_build

    if not is_cpu_build():  # a machine with a GPU takes a moment to say what it has
        return ()
    return check_engine_room(settings.engine, settings.engine_args, 0, where)


def weights_by_folder(manifest: Manifest) -> dict[str, int]:
    """Return the bytes of the weights in each folder that holds a whole model of known size."""
    folders: dict[str, dict[str, int | None]] = defaultdict(dict)
    for artifact in manifest.files:
        folder, _, name = artifact.path.rpartition("/")
        folders[folder][name] = artifact.size_bytes
    found = {}
    for folder, files in folders.items():
        sizes = [files[name] for name in weight_files(files)] if _CONFIG in files else []
        if sizes and None not in sizes:
            found[folder] = sum(size for size in sizes if size)
    return found


def _least_served(
    settings: Settings, manifest: Manifest, store: Store, folder: str, size: int
) -> int:
    """Return the least that weights of *size* bytes in *folder* may take where they are served."""
    from loader.serve.size import served_bytes, stored_dtype

    root = settings.training.download_folder
    config: object = {}
    for artifact in manifest.files:
        if artifact.path == f"{folder}/{_CONFIG}":
            with contextlib.suppress(ValueError):
                config = parse_json(read_artifact(artifact, root, store))
    if isinstance(config, dict) and stored_dtype(config):
        return served_bytes(config, size, settings.engine_args.get("dtype"))
    return size // 2  # float32, of which vLLM makes a half
