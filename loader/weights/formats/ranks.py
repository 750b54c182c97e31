"""Hugging Face shards spread over ranks -> tensors as pieces.

::

    rank-0/<checkpoint>/model-00001-of-00004.safetensors
    rank-1/<checkpoint>/model-00002-of-00004.safetensors
    <any rank or none>/model.safetensors.index.json

The same with ``pytorch_model-….bin``, which are read as ``archive`` reads them, and with the full
state dict that accelerate's FSDP saves on one rank, ``pytorch_model_fsdp.bin``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice

from loader.errors import CheckpointError, FormatError
from loader.weights.byte_files import ByteFile
from loader.weights.formats.archive import Archive
from loader.weights.formats.hfstorage import read_range_header
from loader.weights.formats.pieces import Piece, SourceTensor
from loader.weights.formats.rank_files import Files, read_all
from loader.weights.formats.records import TensorRef
from loader.weights.frameworks import FSDP_WEIGHTS
from loader.weights.index import MOST_SHARDS, weight_map

MAX_INDEX_BYTES = 1 << 28
_SAFE, _PICKLED = "safetensors", "bin"
_SHARD = re.compile(
    r"^(?P<stem>model|pytorch_model)-(?P<i>\d{5,9})-of-(?P<n>\d{5,9})\.(?P<kind>safetensors|bin)$"
)
_WHOLE = {_SAFE: "model.safetensors", _PICKLED: "pytorch_model.bin"}


class RankShardsSource:
    """The tensors of weight files that lie in several ranks' folders; safetensors win."""

    def __init__(self, files: Files) -> None:
        kind = next((k for k in (_SAFE, _PICKLED) if _shards(files, k)), _SAFE)
        names = _shards(files, kind)
        _refuse_missing(names, _read_index(files, kind), kind)
        found: dict[str, SourceTensor] = {}
        twice = []
        for file_name in names:
            file = files.open(file_name)
            pieces = _read_safetensors(file) if kind == _SAFE else _read_pickle(file)
            for name, piece in pieces.items():
                if name in found:
                    twice.append(f"{name}: again in {file_name}")
                found[name] = SourceTensor(name, piece.dtype, piece.sizes, piece.sizes, (piece,))
        if twice:
            raise FormatError(
                "tensors stored twice",
                problems=twice,
                next_step="leave out the files that belong to another checkpoint",
            )
        self._found = found
        self.shapes: Mapping[str, tuple[int, ...]] = {n: t.shape for n, t in found.items()}
        self.dtypes: Mapping[str, str] = {n: t.dtype for n, t in found.items()}

    def open(self, names: Sequence[str], dtype: str | None) -> tuple[SourceTensor, ...]:
        """Return the tensors of these names; they are stored in one dtype, whatever is asked."""
        return tuple(self._found[name] for name in names)


def has_weights(files: Files) -> bool:
    """Return whether there are weight files among *files*."""
    return any(_shards(files, kind) for kind in (_SAFE, _PICKLED))


def _shards(files: Files, kind: str) -> list[str]:
    found = (n for n in files.names if (m := _SHARD.match(n)) and m["kind"] == kind)
    whole = {_WHOLE[kind]} & files.names
    if kind == _PICKLED:
        whole |= set(filter(FSDP_WEIGHTS.match, files.names))
    return sorted([*found, *whole])


def _read_safetensors(file: ByteFile) -> dict[str, Piece]:
    return {
        name: Piece(file, info.start, info.dtype, (0,) * len(info.shape), info.shape)
        for name, info in read_range_header(file).tensors.items()
    }


def _read_pickle(file: ByteFile) -> dict[str, Piece]:
    archive = Archive(file)
    if not isinstance(archive.value, dict):
        raise FormatError(
            "a pickle that is no state dict",
            where=file.where,
            expected="tensors by name",
            got=type(archive.value).__name__,
            next_step="save with safe_serialization=True",
        )
    tensors = archive.value.items()
    return {str(k): archive.piece(v) for k, v in tensors if isinstance(v, TensorRef)}


def _read_index(files: Files, kind: str) -> Mapping[str, str]:
    name = f"{_WHOLE[kind]}.index.json"
    if name not in files.names:
        return {}
    file = files.open(name)
    return weight_map(read_all(file, limit_bytes=MAX_INDEX_BYTES), file.where)


def _refuse_missing(names: Sequence[str], index: Mapping[str, str], kind: str) -> None:
    """Raise CheckpointError for shards that no rank has, by tensor where an index knows them."""
    problems = [f"{name}: no rank has {s}" for name, s in index.items() if s not in names]
    matches = [m for m in map(_SHARD.match, names) if m]
    have = {(m["stem"], int(m["i"]), m["n"]) for m in matches}
    first = 0 if any(i == 0 for _, i, _ in have) else 1
    if not index:
        holes = (
            f"no rank has {stem}-{i:05d}-of-{n}.{kind}"
            for stem, n in sorted({(stem, n) for stem, _, n in have})
            for i in range(first, first + int(n))
            if (stem, i, n) not in have
        )
        problems += islice(holes, MOST_SHARDS)
    if problems or not names:
        raise CheckpointError(
            "shards of the model that no rank's folder holds",
            problems=problems,
            next_step="fetch the folders of all ranks, rank-*/<checkpoint>/",
        )
