"""A model's folder that fills up tensor by tensor, as a test says; what is not here yet is NaN."""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from loader.errors import LoaderError
from loader.threads import Broadcast
from loader.types import Head
from loader.weights.header import TensorInfo, read_header

_NAN = b"\xff"  # in every floating format


class SlowFolder:
    """A ``FillingFolder`` in *folder* that becomes what lies in *source*."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        weights = sorted(source.glob("*.safetensors"))
        self.small_files = {
            path.relative_to(source).as_posix(): path
            for path in source.rglob("*")
            if path.is_file() and path not in weights
        }
        self.heads: dict[str, Head] = {}
        self._tensors: dict[str, tuple[Path, TensorInfo]] = {}
        self._whole: Broadcast[str] = Broadcast()
        for path in weights:
            header = read_header(path)
            size_bytes = path.stat().st_size
            self.heads[path.name] = Head(path.read_bytes()[: header.data_start], size_bytes)
            (folder / path.name).write_bytes(_NAN * size_bytes)
            self._tensors |= {name: (path, info) for name, info in header.tensors.items()}

    def order(self, how: str) -> list[str]:
        """Return the names of all tensors, as they lie, ``reversed`` or ``shuffled``."""
        names = list(self._tensors)
        if how == "shuffled":
            random.Random(7).shuffle(names)
        return names[::-1] if how == "reversed" else names

    def put(self, names: Sequence[str]) -> None:
        """Let the bytes of *names* come."""
        for name in names:
            path, info = self._tensors[name]
            with path.open("rb") as source, (self.folder / path.name).open("r+b") as target:
                source.seek(info.start)
                target.seek(info.start)
                target.write(source.read(info.size_bytes))
        self._whole.put(names)

    def end(self, error: LoaderError | None = None) -> None:
        """Say that all is here, or that nothing comes any more."""
        self._whole.end(error)

    def open(self, file_name: str) -> int:
        """Return a descriptor for reading a weight file."""
        return os.open(self.folder / file_name, os.O_RDONLY | os.O_CLOEXEC)

    def follow(self) -> Iterator[Collection[str]]:
        """Yield names of tensors as they come."""
        return self._whole.follow()
