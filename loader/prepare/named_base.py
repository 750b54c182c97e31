"""The base model that adapters' own configs name: fetched bytes, which may not lead anywhere."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loader.config.settings import CHECKPOINT_SCHEME, Settings
from loader.errors import AdapterError
from loader.stores.hub import REPO_ID

# huggingface_hub/file_download.py, ``repo_folder_name``: where a model lies in the Hub's cache.
_IN_HUB_CACHE = re.compile(
    r"(?:.*/)?models--(?P<id>[^/]+)(?:/snapshots/(?P<revision>[0-9a-f]{40})(?:/.*)?)?/*"
)


@dataclass(frozen=True, slots=True)
class NamedBase:
    """A base by ``name``: a Hugging Face id, with ``revision`` if one is named, or a folder."""

    name: str
    revision: str | None = None

    def over(self, settings: Settings) -> Settings:
        """Return *settings* for this base; a revision that a person chose stays."""
        return replace(settings, base_revision=settings.base_revision or self.revision)


def named_base(named: Mapping[str, object], settings: Settings | None = None) -> NamedBase:
    """Return the one base that all of *named* mean: what an adapter's config says, by its place.

    It is a Hugging Face id, a path inside the Hub's cache, which means one, a checkpoint of a job
    of the config, or a folder below one that the settings name.

    Raises:
        AdapterError: they name none, several, or what a checkpoint may not choose.
    """
    roots = _roots(settings)
    texts = {place: name for place, name in named.items() if isinstance(name, str) and name}
    found = {place: _read(name, roots) for place, name in texts.items()}
    refused = [place for place, base in found.items() if base is None]
    if refused:
        raise AdapterError(
            "an adapter's config names a base model that only you may choose",
            expected="a Hugging Face id, or a folder below the download folder or one of "
            "trusted_folders",
            problems=[f"{place}: {texts[place]}" for place in refused],
            next_step="set base_model to the model that the adapter was trained over",
        )
    bases = set(found.values())
    if len(bases) == 1 and len(found) == len(named) and (base := bases.pop()):
        return base
    raise AdapterError(
        "the adapters do not name one base model",
        problems=[f"{place}: {texts.get(place, 'no base_model_name_or_path')}" for place in named],
        next_step="set base_model",
    )


def named_revision(adapters: Mapping[str, Mapping[str, object]], name: str) -> str | None:
    """Return the revision of the base *name* that the adapters' configs, by place, all mean.

    By PEFT's rule (``auto.py``) it is of the base that the same config names, and of no other.

    Raises:
        AdapterError: they mean several.
    """
    named = {
        place: str(about.get("revision") or "main")
        for place, about in adapters.items()
        if about.get("base_model") == name
    }
    if len(set(named.values())) > 1:
        raise AdapterError(
            "the adapters do not name one revision of their base model",
            where=name,
            problems=[f"{place}: {revision}" for place, revision in named.items()],
            next_step="set base_revision, or serve them apart",
        )
    found = next(iter(named.values()), "main")
    return None if found == "main" else found


def _roots(settings: Settings | None) -> Sequence[Path]:
    if settings is None:
        return ()
    folders = (settings.training.download_folder, settings.cache_folder, *settings.trusted_folders)
    return [Path(folder).resolve() for folder in folders if folder is not None]


def _read(name: str, roots: Sequence[Path]) -> NamedBase | None:
    if match := _IN_HUB_CACHE.fullmatch(name):
        repo = match["id"].replace("--", "/", 1)
        return NamedBase(repo, match["revision"]) if REPO_ID.fullmatch(repo) else None
    if roots and name.startswith(CHECKPOINT_SCHEME):
        name = f"{roots[0]}/{name.removeprefix(CHECKPOINT_SCHEME)}"  # of a job that was fetched
    # Which is taken for a folder, whatever else the name could mean.
    if os.path.isdir(name):  # noqa: PTH112 - False of what is no path at all
        folder = Path(name).resolve()
        return NamedBase(str(folder)) if any(map(folder.is_relative_to, roots)) else None
    return NamedBase(name) if REPO_ID.fullmatch(name) else None
