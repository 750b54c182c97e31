"""A base model by its name -> a folder on this disk: a local one, one behind a URL, or the Hub's.

::

    <cache folder>/bases/<name>-<digest of the URL>/rank-0/…     the files that an engine needs

The cache folder is ``.podloader/models`` of the download folder where none is set.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loader.arriving.late import LateWeights, read_late
from loader.config.settings import Settings
from loader.config.values import user_path
from loader.errors import AdapterError, ConfigError, FetchError, FormatError, redact
from loader.fetch.background import SplitFetch, are_here
from loader.fetch.progress import Progress
from loader.fetch.snapshot import FetchOptions, fetch, read_artifact
from loader.fetch.spans import SpanProgress
from loader.fetch.sum_manifests import declare_sums
from loader.prepare.consolidated import BaseModel, cache_folder, digests
from loader.prepare.inputs import (
    digest_texts,
    names_in,
    sha256_text,
    small_names,
    weight_names,
)
from loader.resolve.manifest import check_names
from loader.retry import ask_again
from loader.stores.hub import REPO_ID, HubModel, fetch_model
from loader.stores.hub_cache import declared_sha256
from loader.stores.model_files import (
    absent_shards,
    find_index,
    missing_files,
    side_files,
    weight_files,
)
from loader.stores.registry import Stores, is_remote
from loader.timeline import Timeline
from loader.types import JOB_ID, Artifact, Checkpoint, Kind, Listing, Manifest, Snapshot
from loader.weights.header import TensorInfo
from loader.weights.index import shard_names
from loader.weights.inspect import open_checkpoint
from loader.weights.quantised import find_packed, is_description
from loader.weights.stored_forms import Packed

_SMALL, _WHOLE = "download of small files", "download of the base"
WHOLE = (Kind.FULL, Kind.WHISPER)
_HUB = "hub"  # of an identity: the model's name there


@dataclass(frozen=True, slots=True)
class LateBase:
    """A base whose weights are not here, its small files in *path*.

    ``identify`` returns what it is, from the snapshot of all of it.
    """

    path: Path
    weights: LateWeights
    identify: Callable[[Snapshot], BaseModel]


def find_base(
    settings: Settings, name: str, timeline: Timeline, progress: Progress | None = None
) -> BaseModel:
    """Return the base called *name*: a local folder, else the small files of one elsewhere.

    Raises:
        AdapterError: *name* is nothing of that sort.
        ConfigError: no full model, or it is not to be had.
        FetchError: it cannot be fetched.
    """
    folder = user_path(name)
    if folder.is_dir():
        checkpoint = open_checkpoint(folder)
        if checkpoint.kind not in WHOLE:
            raise not_a_base(str(folder), checkpoint.kind.value)
        check_weights(settings, checkpoint)
        if missing := checkpoint.detail.get("missing"):
            raise absent_shards(str(folder), missing if isinstance(missing, list) else ())
        return identify_local(settings, folder, weights=False)
    if is_remote(name):
        with SpanProgress(progress, timeline, _SMALL) as watched:
            return fetch_base(settings, name, watched, weights=False)
    if not REPO_ID.fullmatch(name):
        raise AdapterError(
            "the base model is not there",
            where=name,
            expected="a folder on this machine, a folder's URL or a Hugging Face id",
            next_step="set base_model to where the base model lies now",
        )
    with SpanProgress(progress, timeline, _SMALL) as watched:
        model = _fetch_from_hub(settings, name, settings.base_revision, "small files", watched)
    return _identify_cached(settings, model.path, {_HUB: name, "commit": model.commit})


def identify_local(settings: Settings, folder: Path, *, weights: bool) -> BaseModel:
    """Return the model in *folder*, a person's own, by our digests; of its *weights* if wanted.

    Raises:
        ChangedError: it is being written to.
        DiskError: a file cannot be read.
    """
    folder = folder.resolve()
    names = names_in(folder)
    chosen = [*small_names(names), *(weight_names(names) if weights else ())]
    found = digest_texts(digests(settings), folder, chosen)
    kept = {folder / name: digest for name, digest in found.items()}
    return BaseModel(folder, {"files": found}, kept, is_theirs=True)


def _identify_cached(
    settings: Settings, folder: Path, named: Mapping[str, object], *, weights: bool = False
) -> BaseModel:
    """Return the model in *folder* of huggingface-hub's cache, by the Hub's SHA-256 of each file.

    What has none is digested here.
    """
    names = names_in(folder)
    chosen = [*small_names(names), *(weight_names(names) if weights else ())]
    declared = {n: sha for n in chosen if (sha := declared_sha256(folder / n)) is not None}
    kept = {folder / name: sha256_text(sha) for name, sha in declared.items()}
    own = digest_texts(digests(settings), folder, [n for n in chosen if n not in declared])
    files = own | {path.name: text for path, text in kept.items()}
    return BaseModel(folder, {**named, "files": files}, kept)


def bring_base(
    settings: Settings, name: str, timeline: Timeline, progress: Progress | None = None
) -> BaseModel:
    """Return the base called *name*, all of it on this disk.

    Raises:
        LoaderError: as ``find_base``, or its weights cannot be fetched.
    """
    if is_remote(name) and not Path(name).expanduser().is_dir():
        with SpanProgress(progress, timeline, _WHOLE) as watched:
            return fetch_base(settings, name, watched)
    found = find_base(settings, name, timeline, progress)
    if is_on_hub(found):
        return fetch_hub_weights(settings, found, timeline, progress, is_input=True)
    return identify_local(settings, found.path, weights=True)


def fetch_hub_weights(
    settings: Settings,
    small: BaseModel,
    timeline: Timeline,
    progress: Progress | None = None,
    *,
    is_input: bool,
    only: Literal["weights"] | None = "weights",
) -> BaseModel:
    """Return the model of the Hub whose *small* files are here, whole.

    *is_input*: something is made from the weights, so what they are matters. *only*: None brings
    small files that are gone, too.

    Raises:
        ConfigError: no right to read it.
        FetchError: it cannot be fetched, or has no weights.
    """
    name, commit = str(small.identity[_HUB]), str(small.identity["commit"])
    names = [path.name for path in small.path.iterdir()]
    index = find_index(names, allow_pickle=settings.allow_pickle)
    shards = shard_names((small.path / index).read_bytes(), f"{name}: {index}") if index else ()
    with SpanProgress(progress, timeline, _WHOLE) as watched:
        _fetch_from_hub(settings, name, commit, only, watched, shards)
    named = {_HUB: name, "commit": commit}
    return _identify_cached(settings, small.path, named, weights=is_input)


def _fetch_from_hub(
    settings: Settings,
    name: str,
    revision: str | None,
    only: Literal["small files", "weights"] | None,
    watched: SpanProgress,
    indexed: Collection[str] = (),
) -> HubModel:
    return fetch_model(
        name,
        revision,
        told=watched,
        token=hub_token(settings),
        allow_pickle=settings.allow_pickle,
        concurrency=settings.concurrency,
        retries=settings.retries,
        only=only,
        indexed=indexed,
        prove=settings.verify == "full",
    )


def not_a_base(where: str, got: str) -> ConfigError:
    """Return the error for a base that is no full model."""
    return ConfigError(
        "the base model is no full model",
        where=where,
        expected="a full Hugging Face model",
        got=got,
        next_step="correct base_model",
    )


def check_weights(settings: Settings, checkpoint: Checkpoint) -> None:
    """Raise FormatError where weights are pickled and pickles are not allowed."""
    if checkpoint.detail.get("format") == "bin" and not settings.allow_pickle:
        raise FormatError(
            "the weights are pickled",
            where=str(checkpoint.path),
            expected="safetensors",
            got=".bin files",
            next_step="save them as safetensors, or set allow_pickle to read tensors from them",
        )


def is_on_hub(base: BaseModel) -> bool:
    """Return whether *base* is huggingface-hub's."""
    return _HUB in base.identity


@dataclass(frozen=True, slots=True)
class HubWeights:
    """The weights of a model on the Hub, which are not here.

    ``texts`` are the descriptions among them, None where the Hub does not give those by themselves.
    """

    tensors: Mapping[str, TensorInfo]
    texts: Mapping[str, bytes] | None

    def find_packed(self, config: Mapping[str, object]) -> Mapping[str, Packed] | None:
        """Return every quantised weight by the name that it had; None where that is not known.

        Raises:
            FormatError: a description that cannot be understood.
        """
        return (
            None
            if self.texts is None
            else find_packed(config, self.tensors, self.texts.__getitem__)
        )


def read_hub_weights(settings: Settings, small: BaseModel) -> HubWeights | None:
    """Return what a model on the Hub is made of, by its headers, its weights not being here.

    None where *small*, what is here of it, has weights, or where the Hub cannot tell.

    Raises:
        FetchError: the Hub refuses.
        TransientError: the Hub did not answer.
    """
    from loader.stores.hub_headers import read_tensors, read_values

    if any(small.path.glob("*.safetensors")):
        return None
    name, commit = str(small.identity[_HUB]), str(small.identity["commit"])
    token = hub_token(settings)
    tensors = ask_again(lambda: read_tensors(name, commit, token=token), settings.retries)
    if tensors is None:
        return None
    described = {tensor: t for tensor, t in tensors.items() if is_description(tensor)}
    return HubWeights(
        {n: TensorInfo(n, t.dtype, t.shape, t.start, t.end) for n, t in tensors.items()},
        ask_again(lambda: read_values(name, commit, described, token=token), settings.retries)
        if described
        else {},
    )


def hub_token(settings: Settings) -> str | None:
    return settings.hf_token.value if settings.hf_token else None


def fetch_base(
    settings: Settings, url: str, progress: Progress | None = None, *, weights: bool = True
) -> BaseModel:
    """Return the model in the folder at *url*, such as ``s3://bucket/model``; *weights* if wanted.

    Raises:
        ConfigError: no such sort of place, or a package or credentials are missing.
        FetchError: it cannot be fetched, or has no weights.
    """
    with contextlib.closing(Stores(settings)) as stores:
        files = find_base_files(settings, stores, url, weights=weights)
        snapshot = fetch(files.manifest, files.root, stores, FetchOptions.of(settings), progress)
    return files.identify(snapshot)


@contextlib.contextmanager
def opened_base(
    settings: Settings, url: str, timeline: Timeline, progress: Progress | None = None
) -> Iterator[BaseModel | LateBase]:
    """Give the model in the folder at *url*, for the length of the block.

    It is whole where an earlier run fetched it, or where its weights are pickled.

    Raises:
        ConfigError: no such sort of place, or a package or credentials are missing.
        FetchError: it cannot be fetched, or has no weights.
    """
    with contextlib.closing(Stores(settings)) as stores:
        files = find_base_files(settings, stores, url, weights=True)
        options = FetchOptions.of(settings)
        late = tuple(a for a in files.manifest.files if a.name.endswith(".safetensors"))
        if not late or are_here(late, files.root):
            with SpanProgress(progress, timeline, _WHOLE) as watched:
                snapshot = fetch(files.manifest, files.root, stores, options, watched)
            yield files.identify(snapshot)
            return
        parts = SplitFetch.split(files.manifest, late, files.root, stores, options, progress)
        first = parts.fetch_early(timeline, _SMALL)
        yield LateBase(files.folder, read_late(parts, first, timeline), files.identify)


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """What an engine needs of the folder at *url*, and where it goes."""

    url: str
    name: str
    root: Path
    manifest: Manifest

    @property
    def folder(self) -> Path:
        return self.root / self.name / "rank-0"

    def identify(self, snapshot: Snapshot) -> BaseModel:
        found = {file.path.partition("/rank-0/")[2]: file.digest for file in snapshot.files}
        kept = {snapshot.root / file.path: file.digest for file in snapshot.files if file.reused}
        return BaseModel(self.folder, {"url": redact(self.url), "files": found}, kept)


def find_base_files(settings: Settings, stores: Stores, url: str, *, weights: bool) -> BaseFiles:
    """Return what an engine needs of the folder at *url*: it is listed, its index is read.

    Raises:
        ConfigError: no such sort of place, or a package or credentials are missing.
        FetchError: the place does not answer, or has no weights.
    """
    root = cache_folder(settings) / "bases"
    last = url.rstrip("/").rpartition("/")[2]
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:12]
    name = f"{last if JOB_ID.fullmatch(last) else 'base'}-{digest}"
    listing = stores.read_folder(url, name)
    names = [artifact.relative_file_name for artifact in listing.artifacts]
    chosen = set(side_files(names))
    if weights:
        shards = _read_shards(settings, stores, url, listing, root)
        wanted = weight_files(names, allow_pickle=settings.allow_pickle, indexed=shards)
        if not wanted:
            raise FetchError(
                "the base model has no safetensors weights",
                where=url,
                got=", ".join(sorted(names)[:10]),
                next_step="give the folder that save_pretrained wrote, or set allow_pickle to "
                "read .bin files",
            )
        if missing := missing_files(wanted, names, indexed=shards):
            raise absent_shards(url, missing)
        chosen |= set(wanted)
    files: list[Artifact] = [a for a in listing.artifacts if a.relative_file_name in chosen]
    check_names(files)
    declared = declare_sums(files, listing.artifacts, root, stores)
    manifest = Manifest(tuple(sorted(declared, key=lambda a: a.path)))
    return BaseFiles(url, name, root, manifest)


def _read_shards(
    settings: Settings, stores: Stores, url: str, listing: Listing, root: Path
) -> frozenset[str]:
    """Return the files that the index of a folder at *url* names, none where it has no index."""
    artifacts = {artifact.relative_file_name: artifact for artifact in listing.artifacts}
    index = find_index(artifacts, allow_pickle=settings.allow_pickle)
    if index is None:
        return frozenset()
    return shard_names(read_artifact(artifacts[index], root, stores), f"{url}: {index}")
