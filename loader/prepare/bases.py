"""A base model by its name -> a folder on this disk: a local one, one behind a URL, or the Hub's.

::

    <cache folder>/bases/<name>-<digest of the URL>/rank-0/…     the files that an engine needs

The cache folder is ``.podloader/models`` of the download folder where none is set.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, Protocol

from loader.arriving.arriving_weights import ArrivingWeights, StoredWeights
from loader.arriving.delivery import Delivery
from loader.arriving.origin_files import BLOCK_BYTES, RemoteFile
from loader.config.paths import suggest_path
from loader.config.settings import Settings
from loader.config.values import user_path
from loader.errors import AdapterError, ConfigError, FetchError, FormatError, redact
from loader.fetch.progress import Progress
from loader.fetch.snapshot import FetchOptions, read_artifact
from loader.fetch.spans import SpanProgress
from loader.fetch.sum_manifests import declare_sums
from loader.peers import beside_peers
from loader.prepare.checkpoint_sources import BaseModel, Source
from loader.prepare.consolidated import cache_folder, digests
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
from loader.stores.hub_errors import is_offline
from loader.stores.hub_ranges import WholeFileError, read_range
from loader.stores.hub_requests import ask_as_we_do
from loader.stores.model_files import (
    absent_shards,
    find_index,
    missing_files,
    weight_files,
)
from loader.stores.registry import Stores, http_options, is_remote
from loader.threads import map_on_threads
from loader.timeline import Timeline
from loader.types import JOB_ID, Artifact, Checkpoint, Head, Kind, Listing, Manifest, Snapshot
from loader.weights.byte_files import HEAD_BYTES, ByteFile, read_head
from loader.weights.index import read_weight_map, shard_names
from loader.weights.inspect import INDEXES, open_checkpoint
from loader.weights.side_files import side_files

_SMALL, _WHOLE = "download of small files", "download of the base"
WHOLE = (Kind.FULL, Kind.WHISPER)


class FoundBase(Protocol):
    """A base model whose small files are in ``path``, wherever its weights are."""

    @property
    def path(self) -> Path:
        """The folder that it will be whole in."""

    @property
    def weights(self) -> StoredWeights | None:
        """Its weights as their headers tell; None where they are here, or nothing tells.

        Raises:
            LoaderError: the headers cannot be read.
        """

    def begin(self) -> None:
        """Have its weights brought. Raises as a download does."""

    def identify(self, *, weights: bool = True) -> BaseModel:
        """Return what it is, when all that was begun is here; by its *weights*, too, if wanted.

        Raises:
            LoaderError: it does not come, or cannot be read.
        """


@dataclass(frozen=True, slots=True)
class LocalBase:
    """A ``FoundBase`` that is here: a person's own folder, or a *source* that was consolidated."""

    settings: Settings
    path: Path
    source: Source | None = None
    weights: None = None

    def begin(self) -> None:
        """Do nothing."""

    def identify(self, *, weights: bool = True) -> BaseModel:
        """Return what it is, by our digests.

        Raises:
            ChangedError: it is being written to.
            DiskError: a file cannot be read.
        """
        if self.source is not None:
            return self.source.as_base()
        names = names_in(self.path)
        chosen = [*small_names(names), *(weight_names(names) if weights else ())]
        found = digest_texts(digests(self.settings), self.path, chosen)
        kept = {self.path / name: digest for name, digest in found.items()}
        return BaseModel(self.path, {"files": found}, kept, is_theirs=True)


@dataclass(frozen=True)
class ArrivingBase:
    """A ``FoundBase`` whose files are those of *delivery*; *describe* says what it is, once here.

    *rest*: files that are brought behind its weights.
    """

    path: Path
    delivery: Delivery
    describe: Callable[[], BaseModel]
    rest: Collection[str] = ()

    @cached_property
    def weights(self) -> ArrivingWeights | None:
        """Its weights by their headers; None where all are here, or they are pickled."""
        prefix = self.path.relative_to(self.delivery.root).as_posix() + "/"
        names = [p.removeprefix(prefix) for p in self.delivery.paths if p.startswith(prefix)]
        index = self.path / INDEXES[0]
        indexed = set(read_weight_map(index).values()) if index.is_file() else ()
        paths = [prefix + name for name in weight_files(names, indexed=indexed)]
        is_known = all(path in self.delivery.paths for path in paths)
        is_coming = any(not self.delivery.is_here(path) for path in paths)
        return ArrivingWeights(self.delivery, paths) if is_known and is_coming else None

    def begin(self) -> None:
        """Have its weights brought, and what else there is. Raises as ``Delivery.begin`` does."""
        order = self.weights.order if self.weights else ()
        self.delivery.begin([*order, *self.rest])

    def identify(self, *, weights: bool = True) -> BaseModel:
        """Return what it is. Raises as ``Delivery.wait`` does."""
        self.delivery.wait()
        return self.describe()


def find_base(
    settings: Settings,
    name: str,
    timeline: Timeline,
    progress: Progress | None,
    stack: contextlib.ExitStack,
    *,
    weights: bool = True,
) -> FoundBase:
    """Return the base called *name*: a local folder, else the small files of one elsewhere.

    It is there until *stack* ends. *weights*: they will be wanted.

    Raises:
        AdapterError: *name* is nothing of that sort.
        ConfigError: no full model, or it is not to be had.
        FetchError: it cannot be fetched, or has no weights.
    """
    folder = user_path(name)
    if folder.is_dir():
        checkpoint = open_checkpoint(folder)
        if checkpoint.kind not in WHOLE:
            raise not_a_base(str(folder), checkpoint.kind.value)
        check_weights(settings, checkpoint)
        if missing := checkpoint.detail.get("missing"):
            raise absent_shards(str(folder), missing if isinstance(missing, list) else ())
        return LocalBase(settings, folder.resolve())
    if is_remote(name):
        stores = stack.enter_context(contextlib.closing(Stores(settings, progress=progress)))
        files = find_base_files(settings, stores, name, weights=weights)
        store, options = beside_peers(settings, stores, files.root, FetchOptions.of(settings))
        delivery = Delivery(files.manifest, files.root, store, options, timeline, progress)
        stack.enter_context(delivery)
        rest = delivery.find_absent(path for path in delivery.paths if path not in files.small)
        delivery.bring([path for path in delivery.paths if path not in rest], _SMALL)
        return ArrivingBase(files.folder, delivery, lambda: files.identify(delivery.wait()), rest)
    if not REPO_ID.fullmatch(name):
        raise no_such_base(settings, name)
    with SpanProgress(progress, timeline, _SMALL) as watched:
        model = _fetch_from_hub(settings, name, settings.base_revision, "small files", watched)
    return HubBase(settings, name, model, timeline, progress)


def bring_base(
    settings: Settings,
    name: str,
    timeline: Timeline,
    progress: Progress | None = None,
    *,
    weights: bool = True,
) -> BaseModel:
    """Return the base called *name*, all of it on this disk, or without *weights* its small files.

    Raises:
        LoaderError: as ``find_base``, or its weights cannot be fetched.
    """
    with contextlib.ExitStack() as stack:
        base = find_base(settings, name, timeline, progress, stack, weights=weights)
        if weights:
            base.begin()
        return base.identify(weights=weights)


@dataclass(frozen=True)
class HubBase:
    """A ``FoundBase`` in huggingface-hub's cache, which brings whole files alone."""

    settings: Settings
    name: str
    model: HubModel
    timeline: Timeline
    progress: Progress | None

    @property
    def path(self) -> Path:
        """The commit's folder in the cache."""
        return self.model.path

    @cached_property
    def weights(self) -> StoredWeights | None:
        """What it is made of; None where weights are here, or the Hub cannot tell.

        Raises:
            FetchError: the Hub refuses.
            TransientError: the Hub did not answer.
            FormatError: a header is broken.
        """
        index, sizes = self.path / INDEXES[0], self.model.sizes
        indexed = set(read_weight_map(index).values()) if index.is_file() else ()
        names = weight_files(sizes, indexed=indexed)
        is_known = bool(names) and sizes.keys() >= set(names)
        if is_offline() or not is_known or any(self.path.glob("*.safetensors")):
            return None

        def read(name: str) -> Head:
            return read_head(self._open(name, HEAD_BYTES))

        ask_as_we_do(http_options(self.settings))
        try:
            heads = map_on_threads(read, names, self.settings.concurrency)
        except WholeFileError:
            return None
        places = {self.path / name: head for name, head in zip(names, heads, strict=True)}
        return StoredWeights(places, lambda place: self._open(place.name))

    def _open(self, name: str, block_bytes: int = BLOCK_BYTES) -> ByteFile:
        repo, commit, token = self.name, self.model.commit, hub_token(self.settings)

        def read(start: int, buffer: memoryview) -> None:
            ask = partial(read_range, repo, commit, name, start, buffer, token=token)
            ask_again(ask, self.settings.retries)

        size_bytes = self.model.sizes[name]
        return RemoteFile(f"{repo}/{name}", size_bytes, read, block_bytes=block_bytes)

    def begin(self, only: Literal["weights"] | None = "weights") -> None:
        """Bring its weights; *only*: None brings small files that are gone, too.

        Raises:
            ConfigError: no right to read it.
            FetchError: it cannot be fetched, or has no weights.
        """
        settings, name = self.settings, self.name
        names = [path.name for path in self.path.iterdir()]
        index = find_index(names, allow_pickle=settings.allow_pickle)
        shards = shard_names((self.path / index).read_bytes(), f"{name}: {index}") if index else ()
        with SpanProgress(self.progress, self.timeline, _WHOLE) as watched:
            _fetch_from_hub(settings, name, self.model.commit, only, watched, shards)

    def identify(self, *, weights: bool = True) -> BaseModel:
        """Return what it is, by the Hub's SHA-256 of each file; what has none is digested here."""
        folder, names = self.path, names_in(self.path)
        chosen = [*small_names(names), *(weight_names(names) if weights else ())]
        declared = {n: sha for n in chosen if (sha := declared_sha256(folder / n)) is not None}
        kept = {folder / name: sha256_text(sha) for name, sha in declared.items()}
        others = [n for n in chosen if n not in declared]
        own = digest_texts(digests(self.settings), folder, others)
        files = own | {n: kept[folder / n] for n in declared}
        identity = {"hub": self.name, "commit": self.model.commit, "files": files}
        return BaseModel(folder, identity, kept)


def _fetch_from_hub(
    settings: Settings,
    name: str,
    revision: str | None,
    only: Literal["small files", "weights"] | None,
    watched: SpanProgress,
    indexed: Collection[str] = (),
) -> HubModel:
    ask_as_we_do(http_options(settings))
    return fetch_model(
        name,
        revision,
        progress=watched,
        token=hub_token(settings),
        allow_pickle=settings.allow_pickle,
        concurrency=settings.concurrency,
        retries=settings.retries,
        only=only,
        indexed=indexed,
        prove=settings.verify == "full",
    )


def no_such_base(settings: Settings, name: str) -> AdapterError:
    """Return the error for a *name* that means no base model."""
    origin = settings.origins.get("base_model", "an adapter's config")
    return AdapterError(
        "the base model is not there",
        where=name,
        expected="a folder on this machine, a folder's URL or a Hugging Face id",
        got=f"what {origin} names",
        next_step=suggest_path(name, "set base_model to where the base model lies now"),
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


def hub_token(settings: Settings) -> str | None:
    return settings.hf_token.value if settings.hf_token else None


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """What an engine needs of the folder at *url*, and where it goes."""

    url: str
    name: str
    root: Path
    manifest: Manifest
    small: frozenset[str]

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
    side = side_files(names)
    chosen = set(side)
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
    small = frozenset(a.path for a in manifest.files if a.relative_file_name in side)
    return BaseFiles(url, name, root, manifest, small)


def _read_shards(
    settings: Settings, stores: Stores, url: str, listing: Listing, root: Path
) -> frozenset[str]:
    """Return the files that the index of a folder at *url* names, none where it has no index."""
    artifacts = {artifact.relative_file_name: artifact for artifact in listing.artifacts}
    index = find_index(artifacts, allow_pickle=settings.allow_pickle)
    if index is None:
        return frozenset()
    return shard_names(read_artifact(artifacts[index], root, stores), f"{url}: {index}")
