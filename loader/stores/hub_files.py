"""Files of a model on the Hub -> huggingface-hub's cache, each told of as it comes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from loader.retry import ask_again
from loader.stores.hub_errors import translate_error
from loader.threads import map_on_threads


class Told(Protocol):
    """Who is told of a download, as of a fetch. From many threads."""

    def start(self, files: int, size_bytes: int, have_bytes: int) -> None:
        """So many files and bytes in all, of which *have_bytes* are in the cache."""

    def begin_file(self, path: str, size_bytes: int, have_bytes: int) -> None:
        """This file is asked for."""

    def advance(self, count_bytes: int, path: str) -> None:
        """So many bytes more; fewer, when a file starts over."""

    def finish_file(self, path: str) -> None:
        """One file more is whole."""

    def finish(self) -> None:
        """The download is over, well or not."""


def download_files(
    repo_id: str,
    snapshot: Path,
    files: Mapping[str, int],
    *,
    token: str | None,
    concurrency: int,
    retries: int,
    told: Told,
) -> None:
    """Bring *files*, names and their bytes, into *snapshot*: the cache's folder of one commit.

    Each is called ``<repo_id>/<name>`` to *told*, and asked for up to *retries* times more.

    Raises:
        LoaderError: what the first failed with; no further file is begun then, and those under way
            are not waited for.
    """
    from huggingface_hub import hf_hub_download

    missing = [name for name in files if not (snapshot / name).is_file()]
    have_bytes = sum(size for name, size in files.items() if name not in missing)
    told.start(len(files), sum(files.values()), have_bytes)
    for name in files.keys() - missing:
        told.finish_file(f"{repo_id}/{name}")

    def download(name: str) -> None:
        path = f"{repo_id}/{name}"
        told.begin_file(path, files[name], 0)
        ask_again(lambda: ask(name, path), retries)
        told.finish_file(path)

    def ask(name: str, path: str) -> None:
        try:
            hf_hub_download(
                repo_id,
                name,
                revision=snapshot.name,
                token=token,
                tqdm_class=_bar(told, path),
            )
        except Exception as error:
            raise translate_error(error, repo_id, snapshot.name) from None

    try:
        map_on_threads(download, missing, concurrency)
    finally:
        told.finish()


def _bar(told: Told, path: str) -> Any:
    """Return huggingface-hub's progress bar, unseen, that passes on what its bar of bytes is told.

    Where a file is put together from pieces, another bar counts what came over the network for it.
    """
    import huggingface_hub.utils

    base: Any = huggingface_hub.utils.tqdm  # type: ignore[attr-defined]

    class Bar(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts = not str(kwargs.get("name")).endswith(".transfer")
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> Any:
            if self._counts and n:
                told.advance(int(n), path)
            return super().update(n)

    return Bar
