"""Adapters over a base that is a training checkpoint, too: checked before its weights are fetched,
merged into them while they are.

The adapters and all small files come first. Of the base's weight files only the headers are read
then, at the origin; an adapter that does not fit costs no download. After that, each file of the
base is merged as soon as it is whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import PurePosixPath

from loader.adapters.incoming import IncomingWeights
from loader.fetch.arrivals import Arrivals
from loader.fetch.background import SplitFetch, are_here, join
from loader.ready import Arriving, LateWeights, make_ready
from loader.remote import read_headers
from loader.settings import Settings
from loader.timeline import Timeline
from loader.types import Artifact, Manifest, ReadyModel
from loader.weights.inspect import ADAPTER_CONFIG, find_checkpoints, is_safetensors


def find_late(settings: Settings, manifest: Manifest) -> tuple[Artifact, ...]:
    """Return the weight files that adapters need not wait for; none where all is here already.

    They are those of the base, where it is a training checkpoint in safetensors and adapters come
    with it.
    """
    base = settings.base_checkpoint
    if base is None or not any(a.name.endswith(f"/{ADAPTER_CONFIG}") for a in manifest.files):
        return ()
    folder = PurePosixPath(base.job, base.name)
    late = tuple(
        a
        for a in manifest.files
        if PurePosixPath(a.path).parent == folder and is_safetensors(PurePosixPath(a.path).name)
    )
    return () if are_here(late, settings.training.download_folder) else late


def prepare_while_fetching(
    settings: Settings, fetched: SplitFetch, timeline: Timeline
) -> ReadyModel:
    """Return the ReadyModel of both parts of *fetched*.

    Raises:
        LoaderError: as ``fetch`` and ``make_ready``.
    """
    options = fetched.options
    first = fetched.fetch_early(timeline, "download of adapters")
    with timeline.stage("headers"):
        tensors = read_headers(
            fetched.late.files,
            fetched.root,
            fetched.store,
            concurrency=options.concurrency,
            retries=options.retries,
        )

    @contextlib.contextmanager
    def fetch_late() -> Iterator[Arriving]:
        with fetched.fetching_late(timeline) as arrivals:
            files = _as_they_arrive(fetched.late.files, arrivals)
            yield Arriving(
                IncomingWeights(tensors, files), lambda: join(first, arrivals.wait_all())
            )

    with timeline.stage("inspect"):
        checkpoints = find_checkpoints(fetched.root, fetched.paths)
    return make_ready(settings, first, checkpoints, timeline, LateWeights(tensors, fetch_late))


def _as_they_arrive(artifacts: Sequence[Artifact], arrivals: Arrivals) -> Iterator[Collection[str]]:
    """Yield the names of files that are whole; they arrive in about the order of their paths."""
    left = sorted(artifact.path for artifact in artifacts)
    while left:
        arrivals.wait(left[0])
        here = [path for path in left if arrivals.is_here(path)]
        left = [path for path in left if path not in here]
        yield [PurePosixPath(path).name for path in here]
