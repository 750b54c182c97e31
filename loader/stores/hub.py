"""Base models from the Hugging Face Hub, by huggingface-hub: its cache, token and offline mode."""

from __future__ import annotations

import contextlib
import glob
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loader.errors import ConfigError, FetchError, LoaderError, TransientError
from loader.stores.hub_cache import drop_rotten
from loader.stores.model_files import side_files, weight_files

_SINGLE = "model.safetensors"
_ANSWER_S = 10
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model in huggingface-hub's cache, and the commit that it is."""

    path: Path
    commit: str


class Told(Protocol):
    """Who is told of a download, as of a fetch. From many threads."""

    def start(self, files: int, size_bytes: int, have_bytes: int) -> None:
        """So many files and bytes in all, of which *have_bytes* are in the cache."""

    def advance(self, count_bytes: int, path: str) -> None:
        """So many bytes more."""

    def finish_file(self, path: str) -> None:
        """One file more is whole."""

    def finish(self) -> None:
        """The download is over, well or not."""


@dataclass(frozen=True, slots=True)
class HubDescription:
    """What a model of the Hub is; ``weight_bytes`` is None where nothing tells."""

    config: dict[str, Any]
    weight_bytes: int | None


def fetch_model(
    repo_id: str,
    revision: str | None = None,
    *,
    token: str | None = None,
    allow_pickle: bool = False,
    concurrency: int = 8,
    weights: bool = True,
    prove: bool = False,
    told: Told | None = None,
) -> HubModel:
    """Return the model *repo_id*, downloaded where the cache lacks it; the weights only if wanted.

    *prove*: what the cache held before has to have the Hub's SHA-256, else it comes again.
    ``HF_HOME``, ``HF_HUB_OFFLINE`` and ``HF_ENDPOINT`` are honoured by huggingface-hub itself.

    Raises:
        ConfigError: no such model or revision, or no right to read it.
        FetchError: offline and not in the cache, or only pickled weights.
        TransientError: the Hub did not answer.
    """
    from huggingface_hub import snapshot_download

    began_ns = time.time_ns()
    try:
        chosen = _choose(repo_id, revision, token, allow_pickle=allow_pickle, weights=weights)

        def download(bar: Any = None) -> Path:
            path = snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                allow_patterns=[glob.escape(name) for name in chosen or ("config.json",)],
                local_files_only=chosen is None,  # what was chosen then, lies beside the config
                max_workers=concurrency,
                tqdm_class=bar,
            )
            return Path(path)

        with _telling(told, repo_id, revision, chosen) as bar:
            folder = download(bar)
            if prove and drop_rotten(folder, began_ns):
                folder = download(bar)
    except LoaderError:
        raise
    except Exception as error:
        raise _translate(error, repo_id, revision) from None
    if weights and not weight_files(_names(folder), allow_pickle=allow_pickle):
        raise _no_weights(repo_id)
    return HubModel(folder, folder.name)


def describe_model(
    repo_id: str, revision: str | None = None, *, token: str | None = None
) -> HubDescription:
    """Return config.json of *repo_id* and the bytes of its weights, which stay where they are.

    What huggingface-hub's cache holds is enough; else the Hub is asked, once.

    Raises:
        ConfigError: no such model or revision, or no right to read it.
        FetchError: offline and not in the cache.
        TransientError: the Hub did not answer.
    """
    from huggingface_hub import HfApi, hf_hub_download

    def read(cached: bool) -> Path:
        return Path(
            hf_hub_download(
                repo_id, "config.json", revision=revision, token=token, local_files_only=cached
            )
        )

    def listed_bytes() -> int | None:
        # Without the many tries of a download: this is for a recommendation only.
        info = HfApi(token=token).model_info(
            repo_id, revision=revision, files_metadata=True, timeout=_ANSWER_S
        )
        sizes = _sizes(info)
        return sum(sizes[name] for name in weight_files(sizes)) or None

    with contextlib.suppress(Exception):  # whatever it is, the Hub is asked next
        path = read(cached=True)
        size = _cached_bytes(path.parent)
        with contextlib.suppress(Exception):  # offline: the config alone has to do
            size = size or listed_bytes()
        return HubDescription(_read_config(path), size)
    try:
        size = listed_bytes()
        return HubDescription(_read_config(read(cached=False)), size)
    except Exception as error:
        known = _translate(error, repo_id, revision)
        if not isinstance(known, LoaderError):  # of the HTTP library that huggingface-hub has now
            known = TransientError(
                "the Hub did not answer", where=repo_id, got=type(error).__name__
            )
        raise known from None


def _read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _cached_bytes(folder: Path) -> int | None:
    """Return the bytes of the weights in a folder of the cache, which may hold some of them."""
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE).stat().st_size
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        index = json.loads((folder / f"{_SINGLE}.index.json").read_text(encoding="utf-8"))
        return int(index["metadata"]["total_size"])
    return None


def _choose(
    repo_id: str, revision: str | None, token: str | None, *, allow_pickle: bool, weights: bool
) -> Mapping[str, int] | None:
    """Return the files to ask for and their bytes; None where the Hub is not to be reached."""
    from huggingface_hub import HfApi, errors

    try:
        info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
    except errors.HFValidationError:
        raise
    except errors.HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        return None
    except Exception:  # offline, or the HTTP library's own, which changes with the hub's version
        return None
    sizes = _sizes(info)
    names = list(sizes)
    wanted = weight_files(names, allow_pickle=allow_pickle) if weights else ()
    if weights and not wanted:
        raise _no_weights(repo_id)
    return {name: sizes[name] for name in (*side_files(names), *wanted)}


def _sizes(info: Any) -> dict[str, int]:
    """Return the bytes of each file of a model that was described with them."""
    return {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}


@contextlib.contextmanager
def _telling(
    told: Told | None, repo_id: str, revision: str | None, chosen: Mapping[str, int] | None
) -> Iterator[Any]:
    """Tell of the download of *chosen* in the block; give huggingface-hub's bar for it, if any."""
    if told is None or not chosen:
        yield None
        return
    told.start(len(chosen), sum(chosen.values()), _bytes_here(repo_id, revision, chosen))
    try:
        yield _bar(told, repo_id)
        for name in chosen:
            told.finish_file(f"{repo_id}/{name}")
    finally:
        told.finish()


def _bytes_here(repo_id: str, revision: str | None, chosen: Mapping[str, int]) -> int:
    """Return how many of the *chosen* bytes are in huggingface-hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = (
        size
        for name, size in chosen.items()
        if isinstance(try_to_load_from_cache(repo_id, name, revision=revision), str)
    )
    return sum(found)


def _bar(told: Told, repo_id: str) -> Any:
    """Return huggingface-hub's progress bar, unseen, that passes on what its bar of bytes is told.

    The other bars count files, and bytes before they are put together.
    """
    import huggingface_hub.utils

    base: Any = huggingface_hub.utils.tqdm  # type: ignore[attr-defined]

    class Bar(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            name = str(kwargs.get("name"))
            self._counts = kwargs.get("unit") == "B" and not name.endswith(".transfer")
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> Any:
            if self._counts and n:
                told.advance(int(n), repo_id)
            return super().update(n)

    return Bar


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]


def _no_weights(repo_id: str) -> FetchError:
    return FetchError(
        "the base model has no safetensors weights",
        where=repo_id,
        next_step="choose a revision that has, or set allow_pickle to read .bin files",
    )


def _translate(error: Exception, repo_id: str, revision: str | None) -> Exception:
    from huggingface_hub import errors

    where = f"{repo_id}@{revision}" if revision else repo_id
    if isinstance(error, errors.GatedRepoError):
        return ConfigError(
            "the base model is gated",
            where=where,
            next_step="accept its licence on the Hub and give hf_access_token or HF_TOKEN",
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return ConfigError(
            "no such base model on the Hub, or it is private",
            where=where,
            next_step="correct base_model, give a local folder, or set hf_access_token",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(
            "no such revision of the base model", where=where, next_step="correct base_revision"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return FetchError(
            "the base model is not in the cache and the Hub is not to be reached",
            where=where,
            next_step="unset HF_HUB_OFFLINE, bring the model into HF_HOME, or set base_model to a "
            "local folder",
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HfHubHTTPError) and status is not None and status < 500:
        return FetchError("the Hub refuses", where=where, got=f"HTTP {status}")
    network = type(error).__module__.startswith(("httpx", "httpcore"))
    if network or isinstance(error, OSError | errors.HfHubHTTPError):
        return TransientError("the Hub did not answer", where=where, got=type(error).__name__)
    return error
