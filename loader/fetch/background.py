"""A fetch that runs behind other work."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from loader.fetch.arrivals import Arrivals
from loader.fetch.files import WHOLE, places, read_record, whole_place
from loader.fetch.progress import Progress
from loader.fetch.snapshot import FetchOptions, fetch
from loader.stores.base import Store
from loader.types import Artifact, Manifest

_STOP_S = 1.0  # a thread that waits for an answer is not waited for much longer


@contextlib.contextmanager
def fetching(
    manifest: Manifest,
    root: Path,
    store: Store,
    options: FetchOptions | None = None,
    progress: Progress | None = None,
) -> Iterator[Arrivals]:
    """Fetch *manifest* while the block runs, which waits for the files as it needs them.

    Small files come first, then the large ones in the order of their paths. The block's end waits
    for the fetch; a block that fails stops it, and what has arrived stays for the next run.

    Raises:
        LoaderError: as ``fetch``, whether the block asked for a file or not.
    """
    arrivals = Arrivals(root, (artifact.path for artifact in manifest.files))

    def run() -> None:
        # The error is the waiting threads' to raise; ``end`` has passed it on.
        with contextlib.suppress(BaseException):
            fetch(manifest, root, store, options, progress, arrivals)

    thread = threading.Thread(target=run, name="fetch", daemon=True)
    thread.start()
    try:
        yield arrivals
    except BaseException:
        arrivals.stop.set()
        raise
    else:
        thread.join()
    finally:
        thread.join(_STOP_S)
    arrivals.wait_all()


def are_here(artifacts: Sequence[Artifact], root: Path) -> bool:
    """Return whether an earlier fetch into *root* brought all *artifacts*."""

    def is_here(artifact: Artifact) -> bool:
        place = places(root.absolute(), artifact)
        record = read_record(place)
        return record is not None and whole_place(place, record).size(WHOLE) is not None

    return all(map(is_here, artifacts))
