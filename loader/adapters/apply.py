"""A merge plan carried out: touched tensors a few rows at a time, the others copied as they are."""

from __future__ import annotations

import gc
import math
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import torch

from loader.adapters.edit_plan import MergePlan
from loader.adapters.edits import Edit, Replace
from loader.adapters.fold import Exact, Scratch, fold_all, make_fold, needs_whole
from loader.errors import AdapterError
from loader.weights.header import TensorInfo
from loader.weights.readers import TORCH_DTYPES, Reader
from loader.weights.writer import CheckpointWriter

# 1 MiB of float32: measured best; the arithmetic of one step stays in cache, the calls are few.
_CHUNK_VALUES = 1 << 18
# A product of few rows, or of the last few, may sum up in another order than PEFT's whole one does;
# from 192 rows on, MKL scales a factor beforehand, where PEFT scales the product.
_TILE_ROWS = 16
_MOST_ROWS = 128
_MOST_THREADS = 16

Progress = Callable[[int, int], None]


class _NotFiniteError(Exception):
    """A merged tensor has NaN or infinite values, so many in one piece of it."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__(name, count)
        self.name, self.count = name, count


class _Broken:
    """Tensors that turn out not to be finite: one error names them all."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Let the block end early for such a tensor."""
        try:
            yield
        except _NotFiniteError as error:
            self.found[error.name] = error.count

    def check(self, names: Iterable[str]) -> None:
        """Check that there are none; *names* are all tensors in the order of the files.

        Raises:
            AdapterError: there are some.
        """
        if self.found:
            raise AdapterError(
                "NaN or infinite values in merged tensors",
                expected="finite values",
                problems=[
                    f"{name}: {self.found[name]} that are not, in one piece of it"
                    for name in names
                    if name in self.found
                ],
                next_step="the adapter, or the base under it, is broken: train or fetch it again",
            )


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


@dataclass(frozen=True, slots=True)
class Merging:
    """A merge about to be made: what is read, what is to be done, and where it goes."""

    reader: Reader
    sources: Sequence[Reader]
    plan: MergePlan
    writer: CheckpointWriter
    exact: Exact

    def read(self, part: str) -> torch.Tensor:
        """Return a tensor of an adapter; of several adapters, its name begins with a number."""
        if len(self.sources) == 1:
            return self.sources[0].read(part)
        number, _, own = part.partition(":")
        return self.sources[int(number)].read(own)


def merge_tensors(merging: Merging, on_progress: Progress | None = None) -> bool:
    """Write every tensor of the plan and every other of the base; return whether any changed.

    Of each tensor its first rows are compared with the base's.

    Raises:
        AdapterError: merged tensors with NaN or infinite values; it names all of them.
    """
    reader, plan, writer = merging.reader, merging.plan, merging.writer
    files = writer.files()
    counter = _Counter(sum(t.size_bytes for f in files.values() for t in f.values()), on_progress)
    touched = {*plan.edits, *plan.origins, *reader.derived}
    made_of = _group_by_origin(files, plan)
    local = threading.local()
    failed = threading.Event()
    broken = _Broken()

    def copy(names: list[str]) -> bool:
        if not broken.found:
            writer.copy(names, reader)
        counter.add(sum(reader.tensors[name].size_bytes for name in names))
        return False

    def change(name: str, count: int) -> bool:
        scratch = local.__dict__.setdefault("scratch", Scratch())
        changed = False
        with broken.noted(), torch.inference_mode():
            changed = _merge_tensor(name, merging, scratch)
        counter.add(count)
        return changed

    def submit(names: Collection[str]) -> Iterator[Future[bool]]:
        batch: dict[str, list[TensorInfo]] = {}
        for made in (made for name in names for made in made_of[name]):
            batch.setdefault(made.file, []).append(made.tensor)
        for tensors in batch.values():
            if untouched := [t.name for t in tensors if t.name not in touched]:
                yield pool.submit(copy, untouched)
        # In turns over the files: writers of one file wait for each other.
        for turn in zip_longest(*([t for t in f if t.name in touched] for f in batch.values())):
            yield from (pool.submit(change, t.name, t.size_bytes) for t in turn if t)

    jobs: list[Future[bool]] = []
    with _one_thread_each(), ThreadPoolExecutor(_count_threads(), "merge") as pool:
        try:
            for names in reader.follow():
                for job in submit(names):
                    job.add_done_callback(partial(_tell_failure, failed))
                    jobs.append(job)
                if failed.is_set():
                    break
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    changed = [job.result() for job in jobs if job in done]  # every one: any may have failed
    broken.check(name for tensors in files.values() for name in tensors)
    return any(changed)


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor to be written, and the file that it goes into."""

    tensor: TensorInfo
    file: str


def _group_by_origin(
    files: Mapping[str, Mapping[str, TensorInfo]], plan: MergePlan
) -> Mapping[str, Sequence[_Made]]:
    """Return what is made of each tensor of the base, in the order of the files to be written."""
    found: dict[str, list[_Made]] = {}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            found.setdefault(plan.origins.get(name, name), []).append(_Made(tensor, file))
    return found


def _tell_failure(failed: threading.Event, job: Future[bool]) -> None:
    if not job.cancelled() and job.exception() is not None:
        failed.set()


def _count_threads() -> int:
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the collector of garbage away: a merge makes none, and it looks at all of torch's."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let every thread compute by itself: the tensors are many, the products small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _merge_tensor(name: str, merging: Merging, scratch: Scratch) -> bool:
    """Write one merged tensor; return whether its first rows are others than the base's."""
    reader, plan = merging.reader, merging.plan
    edits = plan.edits.get(name, ())
    origin = plan.origins.get(name, name)
    shape = plan.shapes.get(name, reader.tensors[origin].shape)
    dtype = TORCH_DTYPES[reader.tensors[origin].dtype]
    folds = [make_fold(edit, partial(_read, merging, dtype), merging.exact) for edit in edits]
    if not shape:
        scalar = reader.read(origin).reshape(1)
        value = fold_all(folds, scalar.clone(), 0, scratch)
        _check_finite(name, value)
        merging.writer.write(name, value.reshape(()))
        return not torch.equal(scalar, value)
    step = shape[0] if any(map(needs_whole, edits)) else _rows_at_once(shape)
    changed = any(isinstance(edit, Replace) for edit in edits)
    for start, end in _steps(shape[0], step):
        rows = _first_rows(reader, origin, edits, (end - start, *shape[1:]), start, scratch)
        before = None if changed or start or not folds else rows[: _rows_at_once(shape)].clone()
        if len(edits) > 1 and merging.exact == "float32" and dtype.itemsize < 4:
            rows = rows.to(torch.float32)
        merged = fold_all(folds, rows, start, scratch)
        if merged.dtype != dtype:
            merged, scratch.finite = merged.to(dtype), None
        if folds and not scratch.finite:
            _check_finite(name, merged)
        if before is not None:
            changed = not torch.equal(before, merged[: len(before)])
        merging.writer.write_rows(name, start, merged)
    return changed


def _read(merging: Merging, dtype: torch.dtype, part: str) -> torch.Tensor:
    """Return a tensor of an adapter; PEFT holds it in the dtype of a base of more precision."""
    tensor = merging.read(part)
    return tensor.double() if dtype == torch.float64 else tensor


def _rows_at_once(shape: tuple[int, ...]) -> int:
    width = max(1, math.prod(shape[1:]))
    rows = max(1, min(_MOST_ROWS, _CHUNK_VALUES // width))
    return max(_TILE_ROWS, rows - rows % _TILE_ROWS) if len(shape) == 2 else rows


def _steps(rows: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield starts and ends of pieces of *step* rows; a last one of very few goes with another."""
    start = 0
    while start < rows:
        end = start + step if rows - start - step >= min(step, _TILE_ROWS) else rows
        yield start, end
        start = end


def _first_rows(
    reader: Reader,
    origin: str,
    edits: Sequence[Edit],
    shape: tuple[int, ...],
    start: int,
    scratch: Scratch,
) -> torch.Tensor:
    """Return the base's rows from *start* on; what a replacement overwrites anyway is not read."""
    block = scratch.block("rows", shape, TORCH_DTYPES[reader.tensors[origin].dtype])
    if edits and isinstance(edits[0], Replace):
        return block.tensor
    return reader.read_rows(origin, start, start + shape[0], block)


def _check_finite(name: str, merged: torch.Tensor) -> None:
    # The sum is one pass; it is not finite also when it overflows, which the second look decides.
    if merged.sum(dtype=torch.float32).isfinite() or merged.isfinite().all():
        return
    raise _NotFiniteError(name, int((~merged.isfinite()).sum()))
