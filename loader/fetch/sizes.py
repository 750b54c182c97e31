"""The sizes of a listing: compared with the origin's, and asked for where it lacks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from loader.errors import FetchError, LoaderError
from loader.http.objects import ObjectInfo
from loader.retry import ask_again
from loader.stores.base import Store, Tell, count_up
from loader.threads import map_on_threads
from loader.types import Artifact, Manifest

_RETRIES = 2  # no size is worth a longer wait


def check_size(artifact: Artifact, info: ObjectInfo, store: Store) -> ObjectInfo:
    """Return *info*, what the origin says of the object, where its listing says the same size.

    A listing that can be read again may be older than the object.

    Raises:
        FetchError: they differ, still.
    """
    listed = artifact.size_bytes
    if listed is None or listed == info.size_bytes:
        return info
    problems: tuple[str, ...] = ()
    again = None
    try:
        again = store.listed_size(artifact)
    except LoaderError as reason:
        problems = (f"reading the listing again failed: {reason.what}",)
    if again == info.size_bytes:
        return info
    raise FetchError(
        "what comes is not of the size that the listing says",
        where=artifact.source,
        expected=f"{listed if again is None else again} bytes, by the listing"
        + ("" if again is None else ", read again"),
        got=f"{info.size_bytes} bytes, by the origin",
        problems=problems,
        next_step="see what answers there: a login page or an error may take the place of a file"
        + ("" if again is not None else "; if the file was replaced, get the listing again"),
    )


def ask_version(artifact: Artifact, store: Store, retries: int) -> ObjectInfo:
    """Return which version of the object lies at the origin now.

    Raises:
        FetchError: the origin does not tell, or it is not of the size that the listing says.
    """
    return check_size(artifact, ask_again(partial(store.stat, artifact), retries), store)


def ask_sizes(
    manifest: Manifest, store: Store, concurrency: int, tell: Tell = lambda how_far: None
) -> Manifest:
    """Return *manifest* with the sizes that the listing lacks, and a warning where some stay so.

    After a failure that asking again does not cure, only the answers under way are waited for.
    """
    unknown = [a for a in (*manifest.files, *manifest.left_out) if a.size_bytes is None]
    failures: list[tuple[Artifact, FetchError]] = []

    count = count_up(tell, f"of {len(unknown):,}")

    def ask(artifact: Artifact) -> int | None:
        count(1)
        if any(error.retryable for _, error in failures):
            return None
        try:
            return ask_again(partial(store.stat, artifact), _RETRIES).size_bytes
        except FetchError as error:
            failures.append((artifact, error))
            return None

    sizes = map_on_threads(ask, unknown, concurrency)
    found = {a.path: size for a, size in zip(unknown, sizes, strict=True)}

    def known(artifacts: Sequence[Artifact]) -> tuple[Artifact, ...]:
        return tuple(
            replace(a, size_bytes=found[a.path]) if a.path in found else a for a in artifacts
        )

    warnings = manifest.warnings
    if failures:
        artifact, error = failures[0]
        untold = sizes.count(None)
        warnings += (
            f"the sizes of {untold} of {len(sizes)} files are unknown, such as that of "
            f"{artifact.path}: {error.what}" + (f" ({error.got})" if error.got else ""),
        )
    return replace(
        manifest,
        files=known(manifest.files),
        left_out=known(manifest.left_out),
        warnings=warnings,
    )
