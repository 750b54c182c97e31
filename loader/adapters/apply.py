"""A merge plan carried out: touched tensors a few rows at a time, the others copied as they are."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import zip_longest

import torch

from loader.adapters.edits import Edit, Replace
from loader.adapters.fold import Exact, Scratch, fold_all, make_fold, needs_whole
from loader.adapters.plan import MergePlan
from loader.errors import AdapterError
from loader.weights.header import size_bytes
from loader.weights.readers import TORCH_DTYPES, Reader
from loader.weights.writer import CheckpointWriter

# 2 MiB of float32: measured best; the arithmetic of one step stays in cache, the calls are few.
_CHUNK_VALUES = 1 << 19
_MOST_THREADS = 16

Progress = Callable[[int, int], None]


class _Counter:
    """Bytes done so far, told to whoever wants to know."""

    def __init__(self, total: int, tell: Progress | None) -> None:
        self._total, self._tell = total, tell
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._tell:
                self._tell(self._done, self._total)


def merge_tensors(
    reader: Reader,
    sources: Sequence[Reader],
    plan: MergePlan,
    writer: CheckpointWriter,
    exact: Exact,
    on_progress: Progress | None = None,
) -> None:
    """Write every tensor of *plan* and every other tensor of *reader*.

    Raises:
        AdapterError: a merged tensor with NaN or infinite values.
    """
    files = writer.files()
    counter = _Counter(sum(t.size_bytes for f in files for t in f.values()), on_progress)
    touched = {*plan.edits, *plan.origins}
    local = threading.local()

    def copy(names: list[str]) -> None:
        writer.copy(names, reader)
        counter.add(sum(reader.tensors[name].size_bytes for name in names))

    def change(name: str, count: int) -> None:
        scratch = local.__dict__.setdefault("scratch", Scratch())
        _merge_tensor(name, reader, sources, plan, writer, exact, scratch)
        counter.add(count)

    with _one_thread_each(), ThreadPoolExecutor(_count_threads(), "merge") as pool:
        untouched = ([name for name in tensors if name not in touched] for tensors in files)
        jobs = [pool.submit(copy, names) for names in untouched if names]
        # In turns over the files: writers of one file wait for each other.
        for turn in zip_longest(*([t for t in f.values() if t.name in touched] for f in files)):
            jobs += [pool.submit(change, t.name, t.size_bytes) for t in turn if t]
        done, left = wait(jobs, return_when=FIRST_EXCEPTION)
        for job in left:
            job.cancel()
    for job in done:
        job.result()


def _count_threads() -> int:
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let every thread compute by itself: the tensors are many, the products small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _merge_tensor(
    name: str,
    reader: Reader,
    sources: Sequence[Reader],
    plan: MergePlan,
    writer: CheckpointWriter,
    exact: Exact,
    scratch: Scratch,
) -> None:
    def read(part: str) -> torch.Tensor:
        if len(sources) == 1:
            return sources[0].read(part)
        number, _, own = part.partition(":")
        return sources[int(number)].read(own)

    edits = plan.edits.get(name, ())
    origin = plan.origins.get(name, name)
    shape = plan.shapes.get(name, reader.tensors[origin].shape)
    folds = [make_fold(edit, read, exact) for edit in edits]
    if not shape:
        value = fold_all(folds, reader.read(origin).reshape(1), 0, scratch)
        writer.write(name, value.reshape(()))
        return
    step = shape[0] if any(map(needs_whole, edits)) else _rows_at_once(shape)
    for start in range(0, shape[0], step):
        end = min(start + step, shape[0])
        rows = _first_rows(reader, origin, edits, (end - start, *shape[1:]), start, scratch)
        merged = fold_all(folds, rows, start, scratch)
        if folds and not scratch.finite:
            _check_finite(name, merged)
        writer.write_rows(name, start, merged)


def _rows_at_once(shape: tuple[int, ...]) -> int:
    width = 1
    for size in shape[1:]:
        width *= size
    return max(1, _CHUNK_VALUES // max(1, width))


def _first_rows(
    reader: Reader,
    origin: str,
    edits: Sequence[Edit],
    shape: tuple[int, ...],
    start: int,
    scratch: Scratch,
) -> torch.Tensor:
    """Return the base's rows from *start* on; what a replacement overwrites anyway is not read."""
    info = reader.tensors[origin]
    if edits and isinstance(edits[0], Replace):
        return scratch.take("rows", shape, TORCH_DTYPES[info.dtype])
    memory = scratch.raw("rows", size_bytes(info.dtype, shape))
    return reader.read_rows(origin, start, start + shape[0], memory)


def _check_finite(name: str, merged: torch.Tensor) -> None:
    # The sum is one pass; it is not finite also when it overflows, which the second look decides.
    if merged.sum(dtype=torch.float32).isfinite() or merged.isfinite().all():
        return
    raise AdapterError(
        "NaN or infinite values in a merged tensor",
        where=name,
        expected="finite values",
        got=f"{int((~merged.isfinite()).sum())} that are not, in one piece of it",
        next_step="the adapter, or the base under it, is broken: train or fetch it again",
    )
