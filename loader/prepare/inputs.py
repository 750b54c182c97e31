"""What a derived model is made from: files by their digests, and the proof that they have them.

What is derived is named by the digests of its inputs, so it may have that name only where they are
right. Files that this run has fetched are proved by that; others may have rotted on this disk.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from loader.errors import ChangedError, FetchError
from loader.fetch.digests import Digests
from loader.fetch.files import STATE, Places
from loader.fetch.folders import Folders
from loader.fetch.missing_ranges import digest_text
from loader.stores.model_files import weight_files
from loader.weights.side_files import list_side_files

_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_SHA256 = "sha256:"
_log = logging.getLogger("podloader")


class UnprovedError(FetchError):
    """Files are not what they were when they were fetched. The next run fetches them."""


def small_names(names: Collection[str]) -> list[str]:
    """Return what stands beside the weights of a model's folder."""
    return sorted(n for n in names if not n.startswith(".") and not n.endswith(_OTHER_WEIGHTS))


def weight_names(names: Collection[str]) -> list[str]:
    """Return the files that weights may be read from."""
    beside = [n for n in names if "/" not in n]
    stored = [n for n in beside if n.endswith(".safetensors") and not n.startswith(".")]
    parts = [n for n in names if "/" in n and n.endswith(_OTHER_WEIGHTS)]
    return sorted([*(stored or weight_files(beside, allow_pickle=True)), *parts])


def names_in(folder: Path) -> list[str]:
    """Return the names of the files in *folder*, and of the parts that its modules.json names."""
    beside = [path.name for path in folder.iterdir() if path.is_file()]
    return [*beside, *(name for name in list_side_files(folder) if "/" in name)]


def digest_texts(digests: Digests, folder: Path, names: Collection[str]) -> dict[str, str]:
    """Return our own digest of each file. Raises as ``Digests.of`` does."""
    found = digests.of_all([folder / name for name in names], "crc64nvme")
    return {
        path.relative_to(folder).as_posix(): digest_text(int.from_bytes(sum_, "big"))
        for path, sum_ in found.items()
    }


def sha256_text(hexadecimal: str) -> str:
    """Return how a declared SHA-256 is written beside our own digests."""
    return _SHA256 + hexadecimal


def prove(digests: Digests, kept: Mapping[Path, str], *, is_theirs: bool = False) -> None:
    """Check that every file of *kept* has its digest. *is_theirs*: a person's own file stays.

    Raises:
        UnprovedError: some have another one; the next run fetches them anew.
        ChangedError: a person's file was written to meanwhile.
        DiskError: a file cannot be read.
    """

    def digest(path: Path) -> str:
        if kept[path].startswith(_SHA256):
            return sha256_text(digests.of(path, "sha256").hex())
        return digest_text(int.from_bytes(digests.of(path, "crc64nvme"), "big"))

    wrong = [path for path, found in digests.each(kept, digest).items() if found != kept[path]]
    if not wrong:
        return
    if is_theirs:
        raise ChangedError(
            "the base model changed while it was being read",
            problems=[str(path) for path in wrong],
            next_step="run again once nothing writes to it any more",
        )
    for path in wrong:
        with contextlib.suppress(OSError):
            _disown(path, is_cached=kept[path].startswith(_SHA256))
    raise UnprovedError(
        "files are not what was fetched any more",
        problems=[str(path) for path in wrong],
        next_step="run again: they are fetched anew; a second time means that the disk is failing",
    )


def _disown(path: Path, *, is_cached: bool) -> None:
    """Let a file come anew: one of huggingface-hub's cache goes, one that was fetched loses its
    record. That may be a link to a file of somebody else's.
    """
    if is_cached:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        return
    root = next(parent for parent in path.parents if (parent / STATE).is_dir())
    Places(Folders(str(root)), path.relative_to(root).as_posix()).remove("record")


@contextlib.contextmanager
def proving(check: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Run *check* while the block runs, and give what waits for its end and raises as it does."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            check()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="prove", daemon=True)
    thread.start()

    def wait() -> None:
        thread.join()
        if failures:
            raise failures[0]

    yield wait
