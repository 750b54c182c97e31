"""DCP's safetensors storage -> tensors as pieces.

::

    <rank r's folder>/shard-<r+1>-model-<i>-of-<n>.safetensors
        header's metadata: DCP_SHARDING_INFO = {"<tensor>": {"saved_offsets": [0, 97]}}

There is no ``.metadata``: a tensor's shape is what its pieces reach to, so a missing rank shows as
a hole only where a piece behind it is there. What lacks at the end shows against the model's shape.
Source of the format: torch/distributed/checkpoint/hf_storage.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from loader.errors import CheckpointError, FormatError
from loader.json_text import parse_json
from loader.weights.byte_files import ByteFile, read_head
from loader.weights.formats.pieces import Piece, SourceTensor, find_holes
from loader.weights.formats.rank_files import Files
from loader.weights.formats.records import dimensions
from loader.weights.header import Header, parse_header

SHARDING_INFO = "DCP_SHARDING_INFO"
_SHARD = re.compile(r"^shard-\d+-.*\.safetensors$")


def is_storage(files: Files) -> bool:
    """Return whether a folder holds DCP's safetensors storage."""
    return any(_SHARD.match(name) for name in files.names)


class SafetensorsStorageSource:
    """The tensors of DCP's safetensors storage."""

    def __init__(self, files: Files) -> None:
        names = sorted(name for name in files.names if _SHARD.match(name))
        found: dict[str, list[Piece]] = {}
        for name in names:
            for tensor, piece in _read_shard(files.open(name)):
                found.setdefault(tensor, []).append(piece)
        self._where = ", ".join(names[:4])
        self._pieces = found
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: _reach(pieces) for name, pieces in found.items()
        }
        self.dtypes: Mapping[str, str] = {name: p[0].dtype for name, p in found.items()}

    def open(self, names: Sequence[str], dtype: str | None) -> tuple[SourceTensor, ...]:
        """Return the tensors of these names; they are stored in one dtype, whatever is asked.

        Raises:
            CheckpointError: pieces that do not make up their tensors; all are listed.
        """
        made = []
        for name in names:
            pieces, shape = self._pieces[name], self.shapes[name]
            made.append(SourceTensor(name, pieces[0].dtype, shape, shape, tuple(pieces)))
        problems = [hole for tensor in made for hole in find_holes(tensor)]
        problems += [
            f"{tensor.name}: stored in several dtypes"
            for tensor in made
            if len({piece.dtype for piece in tensor.pieces}) > 1
        ]
        if problems:
            raise CheckpointError(
                "parts of tensors that no rank's folder holds",
                where=self._where,
                problems=problems,
                next_step="fetch the folders of all ranks, rank-*/<checkpoint>/",
            )
        return tuple(made)


def read_range_header(file: ByteFile, start: int = 0) -> Header:
    """Return the safetensors header of a file that is read by ranges, from byte *start* to its end.

    Offsets count from *start* on.

    Raises:
        FormatError: it is none, or lies.
    """
    head = read_head(file, start)
    return parse_header(head.content, head.size_bytes, file.where)


def _read_shard(file: ByteFile) -> list[tuple[str, Piece]]:
    header = read_range_header(file)
    try:
        info = parse_json(header.metadata.get(SHARDING_INFO, ""))
        offsets = {name: dimensions(entry["saved_offsets"]) for name, entry in info.items()}
        return [
            (name, Piece(file, tensor.start, tensor.dtype, offsets[name], tensor.shape))
            for name, tensor in header.tensors.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FormatError(
            "a shard of DCP's safetensors storage that does not say where it belongs",
            where=file.where,
            expected=f"{SHARDING_INFO} with saved_offsets of every tensor",
            got=f"{type(error).__name__}: {error}"[:200],
            next_step="fetch the file again, or save the checkpoint again",
        ) from error


def _reach(pieces: Sequence[Piece]) -> tuple[int, ...]:
    ends = [
        tuple(o + s for o, s in zip(piece.offsets, piece.sizes, strict=False)) for piece in pieces
    ]
    return tuple(map(max, zip(*ends, strict=False)))
