"""The sizes that a listing lacks, asked of the origin without downloading anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from loader.errors import FetchError
from loader.retry import ask_again
from loader.stores.base import Store
from loader.threads import map_on_threads
from loader.types import Artifact, Manifest

_RETRIES = 2  # no size is worth a longer wait


def ask_sizes(manifest: Manifest, store: Store, concurrency: int) -> Manifest:
    """Return *manifest* with the sizes that the listing lacks, and a warning where some stay so.

    After a failure that asking again does not cure, only the answers under way are waited for.
    """
    unknown = [a for a in (*manifest.files, *manifest.left_out) if a.size_bytes is None]
    failures: list[tuple[Artifact, FetchError]] = []

    def ask(artifact: Artifact) -> int | None:
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
