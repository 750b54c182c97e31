"""A model's folder that fills up, as whoever follows its bytes sees it.

Its source is a fetch that brings the weight files, or a writer that makes them: of the follower
neither knows anything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from loader.types import Head, ReadyModel


class FillingFolder(Protocol):
    """A Hugging Face folder whose config, tokenizer and headers are known and whose bytes come.

    Every method may be called from any thread.
    """

    @property
    def small_files(self) -> Mapping[str, Path]:
        """Where each file that holds no weights lies, by its name in the folder; all are here."""

    @property
    def heads(self) -> Mapping[str, Head]:
        """The whole safetensors header of each weight file, by its name in the folder."""

    def open(self, file_name: str) -> int:
        """Return a descriptor for reading a weight file: the caller's to close.

        It stays that of the same bytes when the file is renamed. The file is never made shorter.

        Raises:
            LoaderError: it cannot be opened.
        """

    def follow(self) -> Iterator[Collection[str]]:
        """Yield names of tensors as all of their bytes have come, those that are here first.

        They need not be proved yet. It ends when all are here; each call is an iteration of its
        own.

        Raises:
            LoaderError: what ended the filling before.
        """


Announce = Callable[[FillingFolder, ReadyModel], None]
"""Told of a model whose weights are on their way, once, as soon as its config, its tokenizer and
all headers are here. The ReadyModel is what will be returned; its folder may not be there yet, and
may get another name."""
