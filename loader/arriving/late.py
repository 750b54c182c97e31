"""Weights of a base that are not here: told from their headers, there tensor by tensor.

Of each file two small ranges are read at the origin, from which every adapter is checked. Then the
files are fetched, and whoever merges into them gets each tensor as soon as its bytes have come.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from loader.adapters.incoming import IncomingWeights
from loader.arriving.rangefiles import RemoteFile
from loader.errors import ChangedError
from loader.fetch.arrivals import Arrivals
from loader.fetch.background import SplitFetch, join
from loader.fetch.files import WHOLE, places, read_record
from loader.fetch.heads import read_head
from loader.threads import map_on_threads
from loader.timeline import Timeline
from loader.types import Artifact, Head, Snapshot
from loader.weights.header import Header, TensorInfo, header_length, parse_header, read_header
from loader.weights.quantised import find_packed, is_description
from loader.weights.stored import StoredTensor, join_headers
from loader.weights.stored_forms import Packed

_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Arriving:
    """What a running fetch still brings: the base's weights, and at its end the whole snapshot."""

    weights: IncomingWeights
    wait: Callable[[], Snapshot]


@dataclass(frozen=True, slots=True)
class LateWeights:
    """The weights of a base, at the origin: the second part of *fetched*; *first* is the other.

    ``headers`` are those of its files, by the places where these will lie; ``stored`` says the
    same of each tensor.
    """

    fetched: SplitFetch
    first: Snapshot
    headers: Mapping[Path, Header]
    stored: Mapping[str, StoredTensor]
    timeline: Timeline

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors, as they are stored."""
        return {name: stored.info for name, stored in self.stored.items()}

    @property
    def size_bytes(self) -> int:
        """The size of all tensors together."""
        return sum(info.size_bytes for info in self.tensors.values())

    @property
    def missing_bytes(self) -> int:
        """The bytes that the disk has yet to find room for."""
        missing = 0
        for artifact in self.fetched.late.files:
            place = places(self.fetched.root, artifact)
            header = self.headers[place.final]
            size = max((t.end for t in header.tensors.values()), default=0)
            with contextlib.suppress(OSError):
                size -= Path(place.part).stat().st_blocks * 512
            here = read_record(place) is not None and place.size(WHOLE) is not None
            missing += 0 if here else max(0, size)
        return missing

    def find_packed(self, config: Mapping[str, object]) -> Mapping[str, Packed]:
        """Return every quantised weight by the name that it had; descriptions are read by ranges.

        Raises:
            FetchError: they cannot be read.
            FormatError: a description that cannot be understood.
        """
        texts: dict[str, bytes] = {}
        if names := [name for name in self.tensors if is_description(name)]:
            read, concurrency = self._open_files(), self.fetched.options.concurrency
            texts = dict(zip(names, map_on_threads(read, names, concurrency), strict=True))
        return find_packed(config, self.tensors, texts.__getitem__)

    def _open_files(self) -> Callable[[str], bytes]:
        """Return what reads a small tensor at the origin."""
        store, retries = self.fetched.store, self.fetched.options.retries
        versions = self.fetched.ask_versions()
        files = {
            self.fetched.root / a.path: RemoteFile(a, store, versions[a.path], retries)
            for a in self.fetched.late.files
        }

        def read(name: str) -> bytes:
            found = self.stored[name]
            buffer = bytearray(found.info.size_bytes)
            files[found.path].read_into(found.info.start, memoryview(buffer))
            return bytes(buffer)

        return read

    @contextlib.contextmanager
    def fetching(self) -> Iterator[Arriving]:
        """Fetch them while the block runs."""
        root = self.fetched.root
        with self.fetched.fetching_late(self.timeline) as arrivals:
            weights = IncomingWeights(
                self.stored,
                self._as_they_arrive(arrivals),
                lambda path: arrivals.open(path.relative_to(root).as_posix()),
            )
            yield Arriving(weights, lambda: join(self.first, arrivals.wait_all()))

    def _as_they_arrive(self, arrivals: Arrivals) -> Iterator[Collection[str]]:
        """Yield the names of tensors that are there, a few at a time.

        Raises:
            LoaderError: the fetch failed.
            ChangedError: a file is another than its header said.
        """
        root = self.fetched.root
        tallies = {a.path: _Tally(self.headers[root / a.path]) for a in self.fetched.late.files}
        for pieces in arrivals.follow(tallies):
            for piece in pieces:
                if piece.whole:
                    self._compare(root / piece.path)
                yield tallies[piece.path].add(piece.start, math.inf if piece.whole else piece.end)

    def _compare(self, path: Path) -> None:
        if read_header(path).tensors != self.headers[path].tensors:
            raise ChangedError(
                "the object changed while it was being read",
                where=str(path),
                expected="the tensors that its header told of before",
                next_step="run again when nobody writes to it any more",
            )


class _Tally:
    """The tensors of one file, each of which is there when all of its bytes are."""

    def __init__(self, header: Header) -> None:
        self._tensors = sorted(header.tensors.values(), key=lambda info: info.start)
        self._starts = [info.start for info in self._tensors]
        self._left = {info.name: info.size_bytes for info in self._tensors}

    def add(self, start: int, end: float) -> list[str]:
        """Return the names of those that are there with bytes ``[start, end)``."""
        found = []
        first = max(0, bisect_left(self._starts, start) - 1)
        for info in islice(self._tensors, first, None):
            if info.start >= end:
                break
            if info.name in self._left:
                self._left[info.name] -= max(0, int(min(end, info.end)) - max(start, info.start))
                if self._left[info.name] <= 0:
                    del self._left[info.name]
                    found.append(info.name)
        return found


def read_late(fetched: SplitFetch, first: Snapshot, timeline: Timeline) -> LateWeights:
    """Return the second part of *fetched*, safetensors files, told from their headers.

    Raises:
        FetchError: they cannot be read.
        FormatError: a header is broken, or a tensor is in two files.
    """
    options = fetched.options

    def read(artifact: Artifact) -> Header:
        def needed(head: Head) -> int:
            return _LENGTH_BYTES + header_length(head.content, head.size_bytes, artifact.path)

        head = read_head(artifact, fetched.store, needed, options.retries)
        return parse_header(head.content, head.size_bytes, artifact.path)

    files = fetched.late.files
    with timeline.stage("headers"):
        headers = map_on_threads(read, files, options.concurrency)
        paths = [fetched.root / artifact.path for artifact in files]
        by_path = dict(zip(paths, headers, strict=True))
        return LateWeights(fetched, first, by_path, join_headers(by_path), timeline)
