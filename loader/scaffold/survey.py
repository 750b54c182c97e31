"""What the listings of a source hold: the checkpoints, and what their small files say of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loader.config.settings import Settings
from loader.errors import ConfigError, FetchError, ListingError, ResolveError
from loader.prepare.remote import read_checkpoints
from loader.resolve.manifest import check_count, check_names
from loader.stores.base import Progress, Store
from loader.stores.registry import Stores
from loader.types import Artifact, Checkpoint, Kind, Listing
from loader.weights.formats.places import home_folders
from loader.weights.formats.refused import find_refusal
from loader.weights.inspect import ADAPTER_CONFIG, INDEXES, read_json
from loader.weights.publishing import temporary_folder

SHARDED = (Kind.RANK_SHARDS, Kind.DCP, Kind.ZERO, Kind.DTENSOR)
_WEIGHTS = (".safetensors", ".bin")
_STEP = re.compile(r"\d+")
_MOST_STATS = 64  # weight files whose sizes are asked for one by one


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint of a listing: ``name`` is ``<folder>`` within its job, ``rank`` where it lies.

    ``config`` is its config.json, or the adapter_config.json of an adapter. ``weight_bytes`` is
    None where the listing does not tell. ``embeds``: laid out as sentence-transformers does.
    ``files`` are named one by one where other checkpoints lie below its folder.
    """

    job: str
    rank: int
    name: str
    kind: Kind
    config: Mapping[str, object]
    weight_bytes: int | None
    embeds: bool = False
    tag: str = ""
    files: tuple[str, ...] = ()

    @property
    def step(self) -> tuple[int, ...]:
        """The numbers of its name, the last first: what makes one more recent than another."""
        return tuple(int(n) for n in reversed(_STEP.findall(f"{self.name}/{self.tag}")))

    @property
    def patterns(self) -> tuple[str, ...]:
        """The entries of ``artifact_references[].paths`` that take it, and nothing else."""
        rank = "*" if self.kind in SHARDED else str(self.rank)
        folder = f"rank-{rank}/{self.name}/" if self.name else f"rank-{rank}/"
        return tuple(f"{folder}{file}" for file in self.files) or (folder,)

    @property
    def path(self) -> str:
        """``<job>/rank-<N>/<folder>``: where it will lie below the download folder."""
        return "/".join(filter(None, (self.job, f"rank-{self.rank}", self.name)))


def survey(
    sources: Sequence[str],
    jobs: Sequence[str] = (),
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> tuple[Found, ...]:
    """Return the checkpoints that *sources* hold, of *jobs* only where some are named.

    Reads the listings and the small files that tell a checkpoint's kind.

    Raises:
        ListingError: no listing, or not of these jobs.
        ResolveError: unsafe names, or no checkpoint that podloader knows.
        FetchError: a small file cannot be read.
        FormatError: a config or an index is malformed.
    """
    settings, progress = settings or Settings.without_config(), progress or Progress()
    store = Stores(settings, progress=progress)
    try:
        listings = _read(sources or settings.artifacts, store, jobs)
        with temporary_folder() as root:
            checkpoints = [
                c
                for c in read_checkpoints(listings, store, root, progress)
                if find_refusal(c) is None
            ]
            known = [_describe(c, root, listings, store) for c in checkpoints]
    finally:
        store.close()
    if not known:
        raise ResolveError(
            "no checkpoint that podloader knows",
            where=", ".join(jobs) or "the listing",
            expected="a model, an adapter, or shards of a model",
            got=", ".join(f"job {x.job}: {len(x.artifacts)} files" for x in listings) or "no job",
            next_step="`podloader inspect` says what there is, and what each lacks",
        )
    return tuple(_apart(f, known, listings) for f in known)


def _read(sources: Sequence[str], store: Stores, jobs: Sequence[str]) -> list[Listing]:
    if not sources:
        raise ConfigError(
            "it is not said where the artifacts are",
            expected="a listing JSON (path or URL), s3://bucket/prefix, baseten, or an fsspec URL",
            next_step="give --artifacts SRC",
        )
    found = [one for source in sources for one in store.read_listings(source, jobs)]
    listings = [x for x in found if not jobs or x.job in jobs]
    for listing in listings:
        check_count(listing)
        check_names(listing.artifacts)
    if not listings:
        raise ListingError(
            "no listing of these jobs",
            expected=", ".join(jobs) or "a job",
            got=", ".join(x.job for x in found) or "no job",
            next_step="correct --job-id",
        )
    return listings


def _describe(
    checkpoint: Checkpoint, root: Path, listings: Sequence[Listing], store: Store
) -> Found:
    job, rank, *folders = checkpoint.path.relative_to(root).parts
    name = "/".join(folders)
    about = ADAPTER_CONFIG if checkpoint.kind is Kind.ADAPTER else "config.json"
    homes = home_folders(checkpoint) if checkpoint.kind in SHARDED else [checkpoint.path]
    config = next((f / about for f in homes if (f / about).is_file()), checkpoint.path / about)
    files = {
        a.path: a
        for listing in listings
        if listing.job == job
        for a in listing.artifacts
        if a.relative_file_name.startswith(f"{name}/" if name else "")
    }
    return Found(
        job=job,
        rank=int(rank.removeprefix("rank-")),
        name=name,
        kind=checkpoint.kind,
        config=read_json(config) if config.is_file() else {},
        weight_bytes=_weight_bytes(checkpoint, root, files, store),
        embeds=any(path.endswith("/modules.json") for path in files),
        tag=str(checkpoint.detail.get("tag") or ""),
    )


def _apart(found: Found, known: Sequence[Found], listings: Sequence[Listing]) -> Found:
    """Return *found* with its own files named, where other checkpoints lie below its folder.

    A trainer leaves its last model so: beside the folders of the checkpoints before it.
    """
    below = f"{found.name}/" if found.name else ""
    inner = [f for f in known if f.job == found.job and f.name != found.name]
    if found.kind in SHARDED or not any(f.name.startswith(below) for f in inner):
        return found
    home = f"{found.path}/"
    paths = (a.path for listing in listings for a in listing.artifacts)
    own = (path.removeprefix(home) for path in paths if path.startswith(home))
    return replace(found, files=tuple(sorted(name for name in own if "/" not in name)))


def _weight_bytes(
    checkpoint: Checkpoint, root: Path, files: Mapping[str, Artifact], store: Store
) -> int | None:
    """Return the bytes of the weights: by the listing, by an index, or by asking the origin.

    DCP and ZeRO files hold optimizer states as well: their bytes say nothing.
    """
    if checkpoint.kind in (Kind.DCP, Kind.ZERO, Kind.DTENSOR):
        return None
    home = checkpoint.path.relative_to(root).as_posix()
    folders = {home}
    if checkpoint.kind is Kind.RANK_SHARDS:
        folders = {path.rpartition("/")[0] for path in files}
    weights = [
        a
        for path, a in files.items()
        if path.rpartition("/")[0] in folders and path.endswith(_WEIGHTS)
    ]
    if any(a.name.endswith(_WEIGHTS[0]) for a in weights):
        weights = [a for a in weights if a.name.endswith(_WEIGHTS[0])]
    sizes = [a.size_bytes for a in weights]
    if None not in sizes:
        return sum(size for size in sizes if size)
    for index in INDEXES:
        if (checkpoint.path / index).is_file():
            metadata = read_json(checkpoint.path / index).get("metadata")
            total = metadata.get("total_size") if isinstance(metadata, dict) else None
            if isinstance(total, int):
                return total
    if len(weights) > _MOST_STATS:
        return None
    try:
        return sum(store.stat(a).size_bytes for a in weights)
    except FetchError:
        return None  # the size is wanted for a recommendation only
