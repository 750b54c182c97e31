"""A base model before it is fetched: its files and its config, by asking what lists them alone."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loader.config.settings import Settings
from loader.config.values import user_path
from loader.fetch.adoption import LaidFiles, presence
from loader.fetch.snapshot import read_artifact
from loader.json_text import parse_json
from loader.prepare.bases import find_base_files, hub_token, no_such_base
from loader.prepare.inputs import names_in, small_names, weight_names
from loader.stores.base import Progress
from loader.stores.hub import REPO_ID, list_model_files
from loader.stores.hub_requests import ask_as_we_do
from loader.stores.registry import Stores, http_options, is_remote
from loader.weights.inspect import read_json

LOCAL, HUB, URL = "this machine", "the Hub", "a URL"
_CONFIG = "config.json"
_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True, slots=True)
class BaseFile:
    """A file of a base: ``presence`` as a manifest's, ``size_bytes`` None where nobody tells."""

    path: str
    size_bytes: int | None
    presence: str


@dataclass(frozen=True, slots=True)
class PlannedBase:
    """A base model by ``name``: ``origin`` in words, its files, and the folder that they are in.

    ``warning``: what is not known of it.
    """

    name: str
    origin: str
    folder: Path | None
    files: tuple[BaseFile, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    warning: str = ""

    @property
    def is_local(self) -> bool:
        """Whether it is a person's own folder on this machine."""
        return self.origin == LOCAL

    @property
    def missing(self) -> tuple[BaseFile, ...]:
        """The files that are to be fetched."""
        return tuple(file for file in self.files if file.presence == "missing")

    @property
    def weight_bytes(self) -> int | None:
        """The bytes of its weights, None where one is not known or there are none."""
        sizes = [file.size_bytes for file in self.files if file.path.endswith(_WEIGHTS)]
        return sum(s for s in sizes if s) or None if None not in sizes else None


def plan_base(settings: Settings, name: str, progress: Progress | None = None) -> PlannedBase:
    """Return the base called *name*, which is no checkpoint of a job.

    Raises:
        LoaderError: it is nowhere, or nobody says what it is made of.
    """
    folder = user_path(name)
    if folder.is_dir():
        names = names_in(folder)
        chosen = sorted({*small_names(names), *weight_names(names)})
        files = [BaseFile(n, (folder / n).stat().st_size, "proved") for n in chosen]
        config = read_json(folder / _CONFIG) if _CONFIG in names else {}
        return PlannedBase(name, LOCAL, folder, tuple(files), config)
    if is_remote(name):
        return _plan_remote(settings, name, progress)
    if not REPO_ID.fullmatch(name):
        raise no_such_base(settings, name)
    ask_as_we_do(http_options(settings))
    found = list_model_files(
        name,
        settings.base_revision,
        token=hub_token(settings),
        allow_pickle=settings.allow_pickle,
    )
    listed = tuple(
        BaseFile(f"{name}/{file}", size, "proved" if (found.folder / file).is_file() else "missing")
        for file, size in found.sizes.items()
    )
    told = f"the Hub did not say what {name} is made of; the cache did" if found.refusal else ""
    return PlannedBase(name, HUB, found.folder, listed, found.config, told)


def _plan_remote(settings: Settings, url: str, progress: Progress | None) -> PlannedBase:
    with contextlib.closing(Stores(settings, progress=progress)) as stores:
        found = find_base_files(settings, stores, url, weights=True)
        here = presence(found.manifest, found.root, LaidFiles(found.root))
        files = tuple(BaseFile(a.path, a.size_bytes, here[a.path]) for a in found.manifest.files)
        config: Mapping[str, object] = {}
        for artifact in found.manifest.files:
            if artifact.relative_file_name == _CONFIG:
                with contextlib.suppress(ValueError):
                    text = parse_json(read_artifact(artifact, found.root, stores))
                    config = text if isinstance(text, dict) else {}
        return PlannedBase(url, URL, found.folder, files, config)
