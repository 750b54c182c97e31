"""Files of a model on the Hub -> huggingface-hub's cache, each told of as it comes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loader.retry import ask_again
from loader.stores.base import Progress
from loader.stores.hub_bodies import choose_way
from loader.stores.hub_errors import translate_error
from loader.threads import map_on_threads


def download_files(
    repo_id: str,
    snapshot: Path,
    files: Mapping[str, int],
    *,
    token: str | None,
    concurrency: int,
    retries: int,
    progress: Progress,
) -> None:
    """Bring *files*, names and their bytes, into *snapshot*: the cache's folder of one commit.

    Each is called ``<repo_id>/<name>`` to *progress*, and asked for up to *retries* times more.

    Raises:
        LoaderError: what the first failed with; no further file is begun then, and those under way
            are not waited for.
    """
    from huggingface_hub import hf_hub_download

    missing = [name for name in files if not (snapshot / name).is_file()]
    have_bytes = sum(size for name, size in files.items() if name not in missing)
    progress.start(len(files), sum(files.values()), have_bytes)
    for name in files.keys() - missing:
        progress.finish_file(f"{repo_id}/{name}")

    choose_way(max(files.values(), default=0))

    def download(name: str) -> None:
        path = f"{repo_id}/{name}"
        progress.begin_file(path, files[name], 0)
        ask_again(lambda: ask(name, path), retries)
        progress.finish_file(path)

    def ask(name: str, path: str) -> None:
        try:
            hf_hub_download(
                repo_id,
                name,
                revision=snapshot.name,
                token=token,
                tqdm_class=_bar(progress, path),
            )
        except Exception as error:
            raise translate_error(error, repo_id, snapshot.name) from None

    try:
        map_on_threads(download, missing, concurrency)
    finally:
        progress.finish()


def _bar(progress: Progress, path: str) -> Any:
    """Return huggingface-hub's progress bar, unseen, that passes on what its bar of bytes counts.

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
                progress.advance(int(n), path)
            return super().update(n)

    return Bar
