"""The files of a manifest: here, on their way, or still at the origin; each is asked for the same.

Whoever prepares a model has the small files brought first, decides by them what becomes of the
weights, and then has those brought, or reads them by ranges where they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from loader.arriving.origin_files import BLOCK_BYTES, ArrivingFile, RemoteFile
from loader.arriving.range_progress import RangeProgress
from loader.fetch.arrivals import Arrivals
from loader.fetch.background import are_here, fetching
from loader.fetch.declared import declared_digest, identify
from loader.fetch.progress import LogProgress, Progress
from loader.fetch.range_read import read_range
from loader.fetch.sizes import ask_version
from loader.fetch.snapshot import FetchOptions
from loader.fetch.spans import SpanProgress
from loader.http.objects import ObjectInfo
from loader.stores.base import Store
from loader.threads import map_on_threads
from loader.timeline import Timeline
from loader.types import Checkpoint, Head, Manifest, Snapshot
from loader.weights.byte_files import HEAD_BYTES, ByteFile, LocalFile, read_head
from loader.weights.formats.places import weight_folders
from loader.weights.formats.rank_files import Files
from loader.weights.header import Header, parse_header


class Delivery:
    """The files of *manifest*, for the folder *root*; a path is ``<job>/rank-<N>/<name>``.

    A context manager: its end waits for what was begun; an error ends that, and what has arrived
    stays for the next run.
    """

    def __init__(
        self,
        manifest: Manifest,
        root: Path,
        store: Store,
        options: FetchOptions,
        timeline: Timeline,
        progress: Progress | None = None,
    ) -> None:
        self.manifest, self.root = manifest, root.absolute()
        self.timeline, self.progress = timeline, progress
        self._artifacts = {artifact.path: artifact for artifact in manifest.files}
        self._store, self._options, self.retries = store, options, options.retries
        self._begun: dict[str, Arrivals] = {}
        self._versions: dict[str, ObjectInfo] = {}
        self._heads: dict[str, Head] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths, sorted."""
        return tuple(self._artifacts)

    def find_absent(self, paths: Iterable[str]) -> list[str]:
        """Return those of *paths* that neither this run brings nor an earlier one brought."""
        left = [self._artifacts[path] for path in paths if path not in self._begun]
        return [artifact.path for artifact in left if not are_here([artifact], self.root)]

    @property
    def is_whole(self) -> bool:
        """Whether this run has brought or found all files."""
        return all(map(self.is_here, self._artifacts))

    def begin(self, paths: Iterable[str], stage: str = "download") -> None:
        """Have files brought, in this order but for small ones, which come first.

        What was begun before is waited for: there is one download at a time.

        Raises:
            LoaderError: that failed.
        """
        chosen = {path: self._artifacts[path] for path in paths if path not in self._begun}
        if not chosen:
            return
        self.wait()
        watched = SpanProgress(self.progress, self.timeline, stage)
        part = Manifest(tuple(chosen.values()))
        fetch = fetching(part, self.root, self._store, self._options, watched)
        self._stack.enter_context(watched)
        arrivals = self._stack.enter_context(fetch)
        self._begun |= dict.fromkeys(chosen, arrivals)

    def bring(self, paths: Iterable[str], stage: str = "download") -> Snapshot:
        """Return what is here when *paths* are, too. Raises as ``begin`` and ``wait`` do."""
        self.begin(paths, stage)
        return self.wait()

    def wait(self) -> Snapshot:
        """Return what is here of all that was begun, when it is.

        Raises:
            LoaderError: the fetch failed.
        """
        parts = [arrivals.wait_all() for arrivals in dict.fromkeys(self._begun.values())]
        return Snapshot(
            self.root,
            tuple(sorted((f for part in parts for f in part.files), key=lambda file: file.path)),
            sum(part.seconds for part in parts),
            sum(part.fetched_bytes for part in parts),
        )

    def arrivals(self, paths: Collection[str]) -> Mapping[Arrivals, Collection[str]]:
        """Return what brings *paths*, which were begun, in the order of time."""
        found: dict[Arrivals, list[str]] = {}
        for path, arrivals in self._begun.items():
            if path in paths:
                found.setdefault(arrivals, []).append(path)
        return found

    def is_pinned(self, paths: Collection[str]) -> bool:
        """Return whether ranges of these files are known to be of one object each, and of which.

        Else all of their bytes have to come, whose digests tell.
        """
        self._ask(paths)
        known = self.identify(paths)
        return all(path in known and self._version(path).ranges for path in paths)

    def can_be_resumed(self, paths: Collection[str]) -> bool:
        """Return whether what an earlier run read by ranges is known to be of the same version."""
        left = [path for path in paths if path not in self._begun]
        return bool(left) and all(self._version(path).is_pinned for path in left)

    def identify(self, paths: Collection[str]) -> Mapping[str, str]:
        """Return what tells the bytes of each file from any others; of one on its way nothing yet.

        The digest of what is here; else a declared sum, or what pins a version.
        """
        found: dict[str, str] = {}
        self._ask([path for path in paths if path not in self._begun])
        for path in paths:
            text = None
            if self.is_here(path):
                text = self._begun[path].file(path).digest
            elif path not in self._begun:
                text = identify(self._artifacts[path], self._version(path))
            found |= {path: text} if text else {}
        return found

    def find_kept(self, paths: Collection[str]) -> Mapping[Path, str]:
        """Return those of *paths* that were here before this run, each with its digest."""
        here = [self._begun[path].file(path) for path in paths if self.is_here(path)]
        return {self.root / file.path: file.digest for file in here if file.reused}

    def is_here(self, path: str) -> bool:
        """Return whether this run has brought or found the whole file."""
        return path in self._begun and self._begun[path].is_here(path)

    def file(
        self, path: str, progress: RangeProgress | None = None, block_bytes: int = BLOCK_BYTES
    ) -> ByteFile:
        """Return the file, to be closed; *progress* is told of what is read at the origin."""
        if self.is_here(path):
            return LocalFile(self.root / path)
        artifact, version, retries = self._artifacts[path], self._version(path), self.retries

        def read(start: int, buffer: memoryview) -> None:
            if progress is None:
                read_range(artifact, self._store, version, start, buffer, retries)
                return
            progress.begin(path)
            retry = partial(progress.retry, path)
            read_range(artifact, self._store, version, start, buffer, retries, retry)

        remote = RemoteFile(
            path,
            version.size_bytes,
            read,
            digest=declared_digest(version),
            has_ranges=version.ranges,
            block_bytes=block_bytes,
        )
        return ArrivingFile(remote, self._begun[path]) if path in self._begun else remote

    def read_heads(self, paths: Collection[str]) -> Mapping[str, Head]:
        """Return the header of each safetensors file, by two small reads where it is not here.

        Raises:
            FetchError: one cannot be read.
            FormatError: one is broken.
        """

        def read(path: str) -> Head:
            with contextlib.closing(self.file(path, block_bytes=HEAD_BYTES)) as file:
                return read_head(file)

        unknown = [path for path in paths if path not in self._heads]
        heads = map_on_threads(read, unknown, self._options.concurrency)
        self._heads |= dict(zip(unknown, heads, strict=True))
        return {path: self._heads[path] for path in paths}

    def read_header(self, place: Path) -> Header | None:
        """Return the header of the file that lies, or will lie, at *place*; None of others.

        Raises:
            LoaderError: as ``read_heads``.
        """
        path = place.relative_to(self.root).as_posix()
        if path not in self._artifacts:
            return None
        head = self.read_heads([path])[path]
        return parse_header(head.content, head.size_bytes, path)

    def open(self, path: str) -> int:
        """Return a descriptor of a file that was begun, of which some is here.

        Raises:
            DiskError: it cannot be opened.
        """
        return self._begun[path].open(path)

    @contextlib.contextmanager
    def opened(self, checkpoint: Checkpoint) -> Iterator[tuple[Files, RangeProgress | None]]:
        """Give the files of *checkpoint*, and what tells of those that stay at the origin."""
        folders = [
            folder.relative_to(self.root).as_posix() for folder in weight_folders(checkpoint)
        ]
        names = {
            path: path.removeprefix(f"{folder}/")
            for folder in folders
            for path in self.paths
            if path.startswith(f"{folder}/")
        }
        self._ask([path for path in names if not self.is_here(path)])
        left = [path for path in names if path not in self._begun]
        with contextlib.ExitStack() as stack:
            watch = None
            if left:
                told = self.progress or LogProgress()
                watch = stack.enter_context(RangeProgress(told, self.timeline, left))
            files = [(name, self.file(path, watch)) for path, name in names.items()]
            yield stack.enter_context(Files(files)), watch

    def _ask(self, paths: Collection[str]) -> None:
        """Ask the origin for the versions that are not known yet."""
        unknown = [path for path in paths if path not in self._versions]

        def ask(path: str) -> ObjectInfo:
            return ask_version(self._artifacts[path], self._store, self.retries)

        versions = map_on_threads(ask, unknown, self._options.concurrency)
        self._versions |= dict(zip(unknown, versions, strict=True))

    def _version(self, path: str) -> ObjectInfo:
        self._ask([path])
        return self._versions[path]
