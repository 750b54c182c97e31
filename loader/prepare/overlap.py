"""Adapters over a base that is a training checkpoint, too: checked before its weights are fetched,
merged into them while they are.

The adapters and all small files come first. Of the base's weight files only the headers are read
then, at the origin; an adapter that does not fit costs no download. After that, each tensor of the
base is merged as soon as it is there.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from loader.adapters.layers import Ask
from loader.arriving.late import read_late
from loader.config.settings import Settings
from loader.fetch.background import SplitFetch, are_here, join
from loader.prepare.ready import make_ready
from loader.timeline import Timeline
from loader.types import Artifact, Manifest, ReadyModel
from loader.weights.index import read_weight_map
from loader.weights.inspect import ADAPTER_CONFIG, INDEXES, find_checkpoints, is_safetensors


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
    settings: Settings, fetched: SplitFetch, timeline: Timeline, ask: Ask | None = None
) -> ReadyModel:
    """Return the ReadyModel of both parts of *fetched*.

    Raises:
        LoaderError: as ``fetch`` and ``make_ready``.
    """
    first = fetched.fetch_early(timeline, "download of adapters")
    with timeline.stage("inspect"):
        checkpoints = find_checkpoints(fetched.root, fetched.paths)
    if not _are_all_late(fetched):
        with fetched.fetching_late(timeline) as arrivals:
            snapshot = join(first, arrivals.wait_all())
        return make_ready(settings, snapshot, checkpoints, timeline, ask=ask)
    late = read_late(fetched, first, timeline)
    return make_ready(settings, first, checkpoints, timeline, late, ask=ask)


def _are_all_late(fetched: SplitFetch) -> bool:
    """Return whether the late files are all of the base's weights; its index may name others."""
    names = {PurePosixPath(artifact.path) for artifact in fetched.late.files}
    folders = {path.parent for path in names}
    indexes = [fetched.root / folder / INDEXES[0] for folder in folders]
    named = {
        path.parent.relative_to(fetched.root) / shard
        for path in indexes
        if path.is_file()
        for shard in read_weight_map(path).values()
    }
    return {PurePosixPath(path.as_posix()) for path in named} <= names
