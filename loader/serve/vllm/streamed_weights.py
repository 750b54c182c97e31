"""vLLM's weights as they arrive: the load format ``podloader``, in each of the engine's workers.

vLLM chooses the files, over stand-ins with whole headers, and makes of the tensors what it always
does. Only the reading of safetensors files is ours: a tensor is handed over when the feed says that
its bytes are here. A model from anywhere else, as a draft model's, is read as vLLM reads it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import heapq
import logging
import math
import mmap
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loader.arriving.feed import Follower, head_digest
from loader.arriving.standins import FEED, is_stand_in
from loader.errors import EngineError, LoaderError
from loader.serve.vllm.streaming import LOAD_FORMAT
from loader.weights.header import TensorInfo, header_length, parse_header

if TYPE_CHECKING:
    import torch

_SMALL_BYTES = 1 << 20  # read, not mapped: a mapping costs more
_TELL_BYTES = 64 << 20
_UNFLATTENED = "torchao"  # a strategy that makes tensors of several
_DIGITS = re.compile(r"(\d+)")
_MAP_FAILED = ctypes.c_void_p(-1).value
_log = logging.getLogger("podloader")

Weights = Iterator[tuple[str, "torch.Tensor"]]


def register_load_format() -> None:
    """Let this process's vLLM know the load format."""
    from loader.serve.vllm.private import (
        DefaultModelLoader,
        register_model_loader,
        safetensors_read_by,
    )

    class StreamedLoader(DefaultModelLoader):  # type: ignore[misc]
        def __init__(self, load_config: Any) -> None:
            super().__init__(dataclasses.replace(load_config, load_format="auto"))

        def _get_weights_iterator(self, source: Any) -> Weights:
            with safetensors_read_by(read_weights):
                found: Weights = super()._get_weights_iterator(source)
                return found

    register_model_loader(LOAD_FORMAT)(StreamedLoader)


def read_weights(
    own: Callable[..., Weights],
    hf_weights_files: Sequence[str],
    use_tqdm_on_load: bool,
    safetensors_load_strategy: str | None = None,
    local_expert_ids: set[int] | None = None,
    **others: Any,
) -> Weights:
    """Yield the tensors of files that fill up as they arrive; by vLLM's *own* where none do.

    Raises:
        LoaderError: what ended the filling.
        EngineError: the feed cannot be followed.
    """
    paths = [Path(file) for file in hf_weights_files]
    feed = paths[0].parent.with_name(FEED)
    if not is_stand_in(paths[0].parent) and not feed.is_socket():
        yield from own(
            hf_weights_files,
            use_tqdm_on_load,
            safetensors_load_strategy,
            local_expert_ids,
            **others,
        )
        return
    from loader.serve.vllm.private import should_skip_weight

    with Follower(feed) as follower:
        try:
            if safetensors_load_strategy == _UNFLATTENED:
                raise ValueError("weights that torchao puts together of several tensors")
            wanted = _Wanted(follower, paths)
            wanted.leave_out(lambda name: should_skip_weight(name, local_expert_ids))
            yield from _follow(follower, wanted)
        except LoaderError:
            raise
        except (OSError, ValueError, KeyError) as error:
            follower.fail(str(error) or type(error).__name__)
            raise EngineError("the weights cannot be followed", got=str(error)) from error
        follower.done()


def _follow(follower: Follower, wanted: _Wanted) -> Weights:
    done_bytes = told_bytes = 0
    while wanted.left:
        for file_name, places in follower.receive(wait=False):
            wanted.arrived(file_name, places)
        if not wanted.has_next():
            follower.take(done_bytes)
            if follower.is_over:
                raise ValueError(f"{wanted.left} tensors never came")
            for file_name, places in follower.receive(wait=True):
                wanted.arrived(file_name, places)
            continue
        file_name, info = wanted.next()
        yield info.name, _open_tensor(follower.descriptor(file_name), info)
        done_bytes += info.size_bytes
        if done_bytes - told_bytes >= _TELL_BYTES:
            follower.take(done_bytes)
            told_bytes = done_bytes


class _Wanted:
    """The tensors of *paths* that are not in the engine yet, and in which order they go there.

    Layer by layer, as far as they are here, and one top-level module after the other: a model may
    take the tensors of each as a group (vllm/model_executor/models/utils.py, AutoWeightsLoader).

    Raises:
        ValueError: other files than the feed's.
    """

    def __init__(self, follower: Follower, paths: Iterable[Path]) -> None:
        self._files: dict[str, list[TensorInfo]] = {}
        for path in paths:
            fed = follower.files[path.name]
            head = _read_head(path)
            if head_digest(head) != fed.digest:
                raise ValueError(f"{path.name} is not the file that is fed")
            header = parse_header(head, fed.size_bytes, path.name)
            self._files[path.name] = list(header.tensors.values())
        names = [info.name for infos in self._files.values() for info in infos]
        self._keys = {name: place for place, name in enumerate(sorted(names, key=_module_order))}
        self._here: dict[str, list[tuple[int, str, TensorInfo]]] = {}
        self._current = ""

    @property
    def left(self) -> int:
        """How many are not in the engine."""
        return len(self._keys)

    def leave_out(self, skips: Callable[[str], bool]) -> None:
        """Want those no more that *skips* names."""
        self._keys = {name: place for name, place in self._keys.items() if not skips(name)}

    def arrived(self, file_name: str, places: Iterable[int]) -> None:
        """Note tensors that are here, by their places in the file."""
        for place in places if file_name in self._files else ():
            info = self._files[file_name][place]
            if info.name in self._keys:
                group = self._here.setdefault(info.name.partition(".")[0], [])
                heapq.heappush(group, (self._keys[info.name], file_name, info))

    def has_next(self) -> bool:
        """Return whether one is here."""
        return bool(self._here)

    def next(self) -> tuple[str, TensorInfo]:
        """Return the one to go next of those that are here, and the file that it is in."""
        if self._current not in self._here:
            self._current = min(self._here, key=lambda module: self._here[module][0][0])
        group = self._here[self._current]
        _, file_name, info = heapq.heappop(group)
        if not group:
            del self._here[self._current]
        del self._keys[info.name]
        return file_name, info


def _module_order(name: str) -> list[tuple[int, str]]:
    """Return what sorts names with layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _DIGITS.split(name)]


def _read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(header_length(length, path.stat().st_size, str(path)))


def _open_tensor(descriptor: int, info: TensorInfo) -> torch.Tensor:
    """Return a tensor all of whose bytes are in the file: over the page cache where it is large.

    Its memory is its own, though a writer's neighbours on the same page may still come: writing to
    it copies the page for it alone.

    Raises:
        ValueError: the file is too short, or torch has no such dtype.
    """
    import torch

    from loader.weights.readers import TORCH_DTYPES

    if info.dtype not in TORCH_DTYPES:
        raise ValueError(f"{info.name}: torch has no {info.dtype}")
    dtype = TORCH_DTYPES[info.dtype]
    if not info.size_bytes:
        return torch.empty(info.shape, dtype=dtype)
    if os.fstat(descriptor).st_size < info.end:
        raise ValueError(f"{info.name}: its file is too short")
    offset = 0
    data: Any
    if info.size_bytes < _SMALL_BYTES:
        data = bytearray(os.pread(descriptor, info.size_bytes, info.start))
    else:
        offset = info.start % mmap.ALLOCATIONGRANULARITY
        data = _map(descriptor, info.start - offset, info.size_bytes + offset)
    count = math.prod(info.shape)
    return torch.frombuffer(data, dtype=dtype, offset=offset, count=count).reshape(info.shape)


def _map(descriptor: int, start: int, size_bytes: int) -> ctypes.Array[ctypes.c_char]:
    """Return bytes of a file as memory, private where it is written to, until nobody has it.

    Python's own ``mmap`` keeps a descriptor for each mapping: a model that holds all its tensors to
    the end would run out of them.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = libc.mmap(None, size_bytes, protection, mmap.MAP_PRIVATE, descriptor, start)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), "a weight file cannot be mapped")
    # SAFETY: the range is inside of the file, which is never made shorter; it is unmapped when the
    # array, which every tensor over it holds, is gone.
    data = (ctypes.c_char * size_bytes).from_address(address)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    weakref.finalize(data, libc.munmap, address, size_bytes).atexit = False
    return data
