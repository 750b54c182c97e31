"""Safetensors files of one model that are not all here: known from their headers, then followed.

Of each file two small ranges are read where it is, from which every adapter is checked. Then the
files are fetched, and whoever follows gets each tensor as soon as its bytes have come.
"""

from __future__ import annotations

import contextlib
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from loader.arriving.delivery import Delivery
from loader.errors import ChangedError
from loader.fetch.files import Places
from loader.fetch.folders import Folders
from loader.threads import map_on_threads
from loader.types import Head
from loader.weights.byte_files import ByteFile
from loader.weights.header import Header, TensorInfo, parse_header, read_header
from loader.weights.quantised import find_packed, is_description
from loader.weights.stored import join_headers
from loader.weights.stored_forms import Packed

if TYPE_CHECKING:
    from loader.weights.readers import SafetensorsReader

_AT_ONCE = 16
_LAYER = re.compile(r"\.(\d+)\.")


class StoredWeights:
    """The weights in safetensors files of which *heads* are the headers, by place.

    *open_file* opens one of them, wherever it is.

    Raises:
        FormatError: a header is broken, or a tensor is in two files.
    """

    def __init__(self, heads: Mapping[Path, Head], open_file: Callable[[Path], ByteFile]) -> None:
        self._headers = {
            path: parse_header(head.content, head.size_bytes, str(path))
            for path, head in heads.items()
        }
        self.stored = join_headers(self._headers)
        self._open_file = open_file

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors, as they are stored."""
        return {name: stored.info for name, stored in self.stored.items()}

    @property
    def missing_bytes(self) -> int:
        """The bytes that the disk has yet to find room for."""
        return sum(info.size_bytes for info in self.tensors.values())

    def find_packed(self, config: Mapping[str, object]) -> Mapping[str, Packed]:
        """Return every quantised weight by the name that it had; descriptions are read by ranges.

        Raises:
            FetchError: they cannot be read.
            FormatError: a description that cannot be understood.
        """
        names = tuple(filter(is_description, self.tensors))
        with contextlib.ExitStack() as stack:
            paths = {self.stored[name].path for name in names}
            opened = {p: stack.enter_context(contextlib.closing(self._open_file(p))) for p in paths}

            def read(name: str) -> bytes:
                found = self.stored[name]
                buffer = bytearray(found.info.size_bytes)
                opened[found.path].read_into(found.info.start, memoryview(buffer))
                return bytes(buffer)

            texts = dict(zip(names, map_on_threads(read, names, _AT_ONCE), strict=True))
        return find_packed(config, self.tensors, texts.__getitem__)


class ArrivingWeights(StoredWeights):
    """The weights in the files *paths* of *delivery*, all in one folder: a ``FillingFolder``.

    Raises:
        FetchError: their headers cannot be read.
        FormatError: as ``StoredWeights``.
    """

    def __init__(self, delivery: Delivery, paths: Collection[str]) -> None:
        self._delivery, self._paths = delivery, {delivery.root / path: path for path in paths}
        with delivery.timeline.stage("headers"):
            heads = delivery.read_heads(paths)
        places = {delivery.root / path: head for path, head in heads.items()}
        super().__init__(places, lambda place: delivery.file(self._paths[place]))
        self.heads: Mapping[str, Head] = {place.name: head for place, head in places.items()}

    @property
    def small_files(self) -> Mapping[str, Path]:
        """The files beside them that are here, by name."""
        folder = next(iter(self._headers)).parent
        here = (self._delivery.root / p for p in self._delivery.paths if self._delivery.is_here(p))
        beside = (place for place in here if place.is_relative_to(folder))
        names = {place.relative_to(folder).as_posix(): place for place in beside}
        return {name: place for name, place in names.items() if name not in self.heads}

    def open(self, file_name: str) -> int:
        """Return a descriptor of one of the files, of which some is here; the caller's to close.

        Raises:
            DiskError: it cannot be opened.
        """
        place = next(place for place in self._paths if place.name == file_name)
        return self._delivery.open(self._paths[place])

    @property
    def missing_bytes(self) -> int:
        """The bytes that the disk has yet to find room for."""
        missing = 0
        for place, header in self._headers.items():
            path = self._paths[place]
            size = max((t.end for t in header.tensors.values()), default=0)
            with contextlib.suppress(OSError):
                part = Places(Folders(str(self._delivery.root)), path).part
                size -= Path(part).stat().st_blocks * 512
            missing += 0 if self._delivery.is_here(path) else max(0, size)
        return missing

    @property
    def order(self) -> Sequence[str]:
        """The paths of the files in the order of the model's layers, for the download."""
        ordered = sorted(self._headers, key=lambda place: _first_layer(self._headers[place]))
        return [self._paths[place] for place in ordered]

    def open_reader(self) -> SafetensorsReader:
        """Return what reads the tensors, large ones as they come; close it."""
        from loader.weights.readers import SafetensorsReader  # torch

        return SafetensorsReader(self.stored, self._open_file, self.follow)

    def follow(self) -> Iterator[Collection[str]]:
        """Yield the names of tensors that are here, a few at a time; they were begun.

        Raises:
            LoaderError: the fetch failed.
            ChangedError: a file is another than its header said.
        """
        tallies = {path: _Tally(self._headers[place]) for place, path in self._paths.items()}
        for arrivals, paths in self._delivery.arrivals(tallies).items():
            for pieces in arrivals.follow(paths):
                for piece in pieces:
                    if piece.whole:
                        self._compare(self._delivery.root / piece.path)
                    end = math.inf if piece.whole else piece.end
                    yield tallies[piece.path].add(piece.start, end)

    def _compare(self, place: Path) -> None:
        if read_header(place).tensors != self._headers[place].tensors:
            raise ChangedError(
                "the object changed while it was being read",
                where=str(place),
                expected="the tensors that its header told of before",
                next_step="run again when nobody writes to it any more",
            )


def _first_layer(header: Header) -> float:
    """Return the first layer that a file has a tensor of; embeddings come before all."""
    found = [float(match[1]) for name in header.tensors if (match := _LAYER.search(name))]
    return -1.0 if any("embed" in name for name in header.tensors) else min(found, default=math.inf)


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
