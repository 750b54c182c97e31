"""Base models from the Hugging Face Hub, by huggingface-hub: its cache, token and offline mode."""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from loader.errors import FetchError, FormatError, LoaderError, TransientError
from loader.json_text import parse_json
from loader.retry import ask_again
from loader.stores.base import Progress
from loader.stores.hub_cache import drop_rotten
from loader.stores.hub_errors import is_offline, leaves_the_cache, translate_error
from loader.stores.hub_files import download_files
from loader.stores.model_files import absent_shards, missing_files, weight_files
from loader.weights.side_files import side_files

_CONFIG, _SINGLE = "config.json", "model.safetensors"
_ANSWER_S = 10
_log = logging.getLogger("podloader")
# huggingface_hub/utils/_validators.py, ``validate_repo_id``.
REPO_ID = re.compile(
    r"(?=.{1,96}$)(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model in huggingface-hub's cache, the commit that it is, and the bytes of all its files."""

    path: Path
    commit: str
    sizes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class HubDescription:
    """What a model of the Hub is; ``weight_bytes`` is None where nothing tells."""

    config: dict[str, Any]
    weight_bytes: int | None


def fetch_model(
    repo_id: str,
    revision: str | None = None,
    *,
    progress: Progress,
    token: str | None = None,
    allow_pickle: bool = False,
    concurrency: int = 8,
    retries: int = 0,
    only: Literal["small files", "weights"] | None = None,
    indexed: Collection[str] = (),
    prove: bool = False,
) -> HubModel:
    """Return the model *repo_id*, downloaded where the cache lacks it; a part of it with *only*.

    *retries*: how often a request is made again after a passing failure. *indexed* are the weight
    files that the model's index names. Where the Hub does not answer, asks for fewer requests or no
    longer honours the token, what the cache holds is taken with a warning, if that is all of it.

    *prove*: files have to have the SHA-256 that the Hub declares, else they come again. *progress*
    is told of every file. ``HF_HOME``, ``HF_HUB_OFFLINE`` and ``HF_ENDPOINT`` are honoured by
    huggingface-hub itself.

    Raises:
        ConfigError: no such model or revision, or no right to read it.
        FetchError: offline and not in the cache, or only pickled weights.
        TransientError: the Hub did not answer.
    """
    try:
        listed = _look_up(repo_id, revision, token, retries)
        folder, sizes = listed.folder, listed.sizes
        side = () if only == "weights" else side_files(sizes)
        weights: tuple[str, ...] = ()
        if only != "small files":
            weights = weight_files(sizes, allow_pickle=allow_pickle, indexed=indexed)
            missing = missing_files(weights, sizes, indexed=indexed)
            if listed.refusal and (missing or not weights):
                raise listed.refusal
            if not weights:
                raise _no_weights(repo_id)
            if missing:
                raise absent_shards(f"{repo_id}@{folder.name}", missing)
        chosen = {name: sizes[name] for name in (*side, *weights)}
        bring = partial(
            download_files,
            repo_id,
            folder,
            chosen,
            token=token,
            concurrency=concurrency,
            retries=retries,
            progress=progress,
        )
        _prove(folder, chosen, bring) if prove else bring()
        if listed.refusal is None and revision != folder.name:
            _note_commit(repo_id, revision, folder, token)
    except LoaderError:
        raise
    except Exception as error:
        raise translate_error(error, repo_id, revision) from None
    return HubModel(folder, folder.name, sizes)


def _prove(folder: Path, names: Iterable[str], bring: Callable[[], None]) -> None:
    """Do *bring*, which brings what is missing of *names*; what is not as declared comes again.

    Raises:
        FetchError: it came wrong twice.
    """
    paths = [folder / name for name in names]
    drop_rotten(paths)
    proved = {path for path in paths if path.is_file()}
    for _ in range(2):
        bring()
        rotten = drop_rotten(path for path in paths if path not in proved)
        if not rotten:
            return
    raise FetchError(
        "what the Hub sends is not what it declares",
        where=str(folder),
        problems=[path.name for path in rotten],
        next_step="check what is between this machine and the Hub, such as a proxy or HF_ENDPOINT",
    )


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
                repo_id, _CONFIG, revision=revision, token=token, local_files_only=cached
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
        raise _known(error, repo_id, revision) from None


def _known(error: Exception, repo_id: str, revision: str | None) -> LoaderError:
    known = translate_error(error, repo_id, revision)
    if isinstance(known, LoaderError):
        return known
    # Of the HTTP library that huggingface-hub has now.
    return TransientError("the Hub did not answer", where=repo_id, got=type(error).__name__)


@dataclass(frozen=True, slots=True)
class HubFiles:
    """The files that an engine needs of a model, by name, with their bytes.

    ``folder`` is where they lie in huggingface-hub's cache, or will. ``refusal``: why the Hub did
    not tell, and the cache did.
    """

    folder: Path
    sizes: Mapping[str, int]
    config: Mapping[str, Any]
    refusal: LoaderError | None


def list_model_files(
    repo_id: str,
    revision: str | None = None,
    *,
    token: str | None = None,
    allow_pickle: bool = False,
) -> HubFiles:
    """Return what ``fetch_model`` would bring. Nothing is kept, and no weights are read.

    Raises:
        LoaderError: as ``fetch_model``; passing failures are not asked again.
    """
    try:
        listed = _look_up(repo_id, revision, token, 0)
        weights = weight_files(listed.sizes, allow_pickle=allow_pickle)
        if not weights:
            raise listed.refusal or _no_weights(repo_id)
        chosen = {name: listed.sizes[name] for name in (*side_files(listed.sizes), *weights)}
        config = _config_of(repo_id, listed.folder, token) if _CONFIG in chosen else {}
    except Exception as error:
        raise _known(error, repo_id, revision) from None
    return HubFiles(listed.folder, chosen, config, listed.refusal)


def _config_of(repo_id: str, folder: Path, token: str | None) -> dict[str, Any]:
    """Return the config.json of the commit in *folder*, or of the Hub: then it is not kept."""
    from huggingface_hub import hf_hub_download

    if (folder / _CONFIG).is_file():
        return _read_config(folder / _CONFIG)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        path = hf_hub_download(repo_id, _CONFIG, revision=folder.name, token=token, cache_dir=cache)
        return _read_config(Path(path))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        config = str(error)
    if not isinstance(config, dict):
        raise FormatError("the model's config.json is no JSON object", where=str(path))
    return config


def _cached_bytes(folder: Path) -> int | None:
    """Return the bytes of the weights in a folder of the cache, which may hold some of them."""
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE).stat().st_size
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
        index = parse_json((folder / f"{_SINGLE}.index.json").read_text(encoding="utf-8"))
        return int(index["metadata"]["total_size"])
    return None


@dataclass(frozen=True, slots=True)
class _Listed:
    """A commit's files and their bytes, and the folder that it has in the cache or will have.

    ``refusal``: why the Hub did not tell; then they are those of the cache.
    """

    folder: Path
    sizes: Mapping[str, int]
    refusal: LoaderError | None = None


def _look_up(repo_id: str, revision: str | None, token: str | None, retries: int) -> _Listed:
    """Return what the Hub says of a model, else what the cache holds of it.

    Raises:
        LoaderError: the Hub does not say, and the cache holds nothing; or there is no such model.
    """

    def cached(refusal: LoaderError) -> _Listed | None:
        with contextlib.suppress(Exception):  # whatever it is, the cache lacks the model
            folder = _find_cached(repo_id, revision)
            return _Listed(folder, _sizes_here(folder), refusal)
        return None

    def ask() -> _Listed:
        try:
            return _list_model(repo_id, revision, token)
        except Exception as error:  # the HTTP library's own changes with the hub's version
            refusal = translate_error(error, repo_id, revision)
            if isinstance(refusal, LoaderError) and leaves_the_cache(refusal):
                here = cached(refusal)
                if here is not None and _is_whole(here.sizes):  # not worth asking again
                    return here
            raise refusal from None

    try:
        found = ask_again(ask, retries)
    except LoaderError as refusal:
        here = cached(refusal) if leaves_the_cache(refusal) else None
        if here is None:
            raise
        found = here
    if found.refusal is not None and not is_offline():
        why = found.refusal
        _log.warning("%s is taken from the cache: %s, %s", repo_id, why.what, why.got)
    return found


def _is_whole(sizes: Mapping[str, int]) -> bool:
    """Return whether the weights are there: the small files came before them."""
    weights = weight_files(sizes, allow_pickle=True)
    return bool(weights) and not missing_files(weights, sizes)


def _list_model(repo_id: str, revision: str | None, token: str | None) -> _Listed:
    """Return what the Hub says of a model."""
    from huggingface_hub import HfApi, constants

    info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
    # huggingface-hub's guide, "Understand caching": where a snapshot lies.
    model = Path(constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}")
    return _Listed(model / "snapshots" / str(info.sha), _sizes(info))


def _find_cached(repo_id: str, revision: str | None) -> Path:
    """Return the folder of the commit in the cache that *revision* was when it was fetched."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo_id, revision=revision, allow_patterns=[_CONFIG], local_files_only=True
        )
    )


def _note_commit(repo_id: str, revision: str | None, folder: Path, token: str | None) -> None:
    """Let the cache know that the branch is the commit in *folder*, for starts without the Hub."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if try_to_load_from_cache(repo_id, _CONFIG, revision=revision) == str(folder / _CONFIG):
        return
    with contextlib.suppress(Exception):  # all that was asked for is here
        hf_hub_download(repo_id, _CONFIG, revision=revision, token=token)


def _sizes(info: Any) -> dict[str, int]:
    """Return the bytes of each file of a model that was described with them."""
    return {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}


def _sizes_here(folder: Path) -> dict[str, int]:
    """Return the bytes of each file in a folder of the cache."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _no_weights(repo_id: str) -> FetchError:
    return FetchError(
        "the base model has no safetensors weights",
        where=repo_id,
        next_step="choose a revision that has, or set allow_pickle to read .bin files",
    )
