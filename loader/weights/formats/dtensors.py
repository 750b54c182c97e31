"""Pickles of DTensors, a file a rank, as verl saves them -> tensors as pieces.

::

    <checkpoint>/model_world_size_<N>_rank_<r>.pt    {tensor: DTensor}: the rank's part and its spec
    <checkpoint>/huggingface/                        config.json, tokenizer

There is no ``.metadata``: the spec of each DTensor says how a mesh of ranks cuts it. Source of the
rules: torch/distributed/tensor/placement_types.py; of the files: verl/utils/checkpoint/
fsdp_checkpoint_manager.py and verl/model_merger/fsdp_model_merger.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from loader.errors import CheckpointError, FormatError, UnsupportedError
from loader.weights.formats.archive import Archive
from loader.weights.formats.pieces import Piece, SourceTensor, find_holes
from loader.weights.formats.rank_files import Files
from loader.weights.formats.records import (
    MOST_RANKS,
    PartRef,
    Record,
    TensorRef,
    counts,
    is_count,
)
from loader.weights.frameworks import DTENSOR_FILE

_OPENED_AT_ONCE = 8


class DTensorSource:
    """The tensors of a checkpoint of DTensors."""

    def __init__(self, files: Files) -> None:
        found = [match for match in map(DTENSOR_FILE.match, sorted(files.names)) if match]
        worlds = sorted({int(match["world"]) for match in found})
        if len(worlds) > 1:
            raise CheckpointError(
                "files of runs of several sizes in one checkpoint",
                problems=[match.string for match in found],
                expected="model_world_size_<N>_rank_<r>.pt of one N",
                next_step="leave out those of the earlier run",
            )
        if worlds[0] > MOST_RANKS:
            raise CheckpointError(
                "a file whose name speaks of more ranks than any job has",
                where=found[0].string,
                expected=f"at most {MOST_RANKS}",
                next_step="fetch the file again under the name that the training job gave it",
            )
        ranks = {int(match["rank"]): match.string for match in found}
        absent = [str(rank) for rank in range(worlds[0]) if rank not in ranks]
        self._absent = f"no rank has the file of {', '.join(absent[:8])}" if absent else ""
        names = [ranks[rank] for rank in sorted(ranks)]
        with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
            archives = list(pool.map(lambda name: Archive(files.open(name)), names))
        self._parts: dict[str, dict[tuple[int, ...], Piece]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        self.shapes: Mapping[str, tuple[int, ...]] = shapes
        self.dtypes: Mapping[str, str] = dtypes
        for rank, archive in zip(sorted(ranks), archives, strict=True):
            self._take(archive, rank, shapes, dtypes)

    def open(self, names: Sequence[str], dtype: str | None) -> tuple[SourceTensor, ...]:
        """Return the tensors of these names; they are stored in one dtype, whatever is asked.

        Raises:
            CheckpointError: parts that no rank's file has; every hole is listed.
        """
        made = [
            SourceTensor(
                name,
                self.dtypes[name],
                self.shapes[name],
                self.shapes[name],
                tuple(self._parts[name].values()),
            )
            for name in names
        ]
        problems = [hole for tensor in made for hole in find_holes(tensor)]
        if problems:
            raise CheckpointError(
                "parts of tensors that no rank's folder holds",
                got=self._absent,
                problems=problems,
                next_step="fetch the folders of all ranks, rank-*/<checkpoint>/",
            )
        return tuple(made)

    def _take(
        self,
        archive: Archive,
        rank: int,
        shapes: dict[str, tuple[int, ...]],
        dtypes: dict[str, str],
    ) -> None:
        """Add what a rank has; of copies on several ranks the first counts."""
        tensors = archive.value
        if not isinstance(tensors, dict):
            raise _malformed(archive, "no state dict")
        for name, value in tensors.items():
            if isinstance(value, TensorRef):
                shape, part, offsets = value.shape, value, (0,) * len(value.shape)
            elif isinstance(value, PartRef):
                shape, part = value.shape, value.part
                offsets = _find_place(archive, str(name), value, rank)
            else:
                continue
            known = shapes.setdefault(name, shape), dtypes.setdefault(name, part.dtype)
            if known != (shape, part.dtype):
                raise _malformed(archive, f"{name}: {part.dtype} {shape}, elsewhere {known}")
            pieces = self._parts.setdefault(name, {})
            if 0 not in part.shape:
                pieces.setdefault(offsets, archive.piece(part, offsets))


def _find_place(archive: Archive, name: str, value: PartRef, rank: int) -> tuple[int, ...]:
    """Return where the part that a rank has begins.

    Each dimension of the mesh, the outermost first, cuts a dimension of what is left into chunks of
    one size but the last; or copies it.
    """
    mesh, placements = value.spec.get("mesh"), value.spec.get("placements")
    sizes = _mesh_shape(mesh)
    if not isinstance(placements, tuple | list) or sizes is None or len(sizes) != len(placements):
        raise _malformed(archive, f"{name}: no mesh, or placements of another one")
    offsets, left = [0] * len(value.shape), list(value.shape)
    for size, at, placement in zip(sizes, _coordinates(mesh, rank, sizes), placements, strict=True):
        kind = placement.kind.rpartition(".")[2] if isinstance(placement, Record) else ""
        if kind == "Replicate":
            continue
        dim = placement.get("dim") if isinstance(placement, Record) else None
        if kind != "Shard" or not is_count(dim) or dim >= len(left):
            raise UnsupportedError(
                "a DTensor that is cut in a way that is not undone here",
                where=f"{archive.where}: {name}",
                expected="Shard and Replicate",
                got=f"{kind or placement} of {list(value.shape)}",
                next_step="merge it in the training job: python -m verl.model_merger merge",
            )
        chunk = -(-left[dim] // size)
        offsets[dim] += min(at * chunk, left[dim])
        left[dim] = max(0, min(chunk, left[dim] - at * chunk))
    if tuple(left) != value.part.shape:
        got = f"{name}: {list(value.part.shape)} where rank {rank} has {left}"
        raise _malformed(archive, got)
    return tuple(offsets)


def _mesh_shape(mesh: object) -> tuple[int, ...] | None:
    """Return the sizes of a mesh; torch has kept them in a tensor of ranks, and in a layout."""
    if not isinstance(mesh, Record):
        return None
    for key in ("mesh", "_mesh"):
        if isinstance(ranks := mesh.get(key), TensorRef):
            return ranks.shape
    layout = mesh.get("_layout")
    axes = layout.get("axes") if isinstance(layout, Record) else None
    if isinstance(axes, tuple | list) and all(isinstance(axis, Record) for axis in axes):
        sizes = [axis.get("shape") for axis in axes]
        return tuple(size for axis in sizes for size in (counts(axis) if axis else ()))
    shape = layout.get("shape") if isinstance(layout, Record) else None
    if isinstance(shape, Record):
        return None
    return (shape,) if is_count(shape) else counts(shape) if shape else None


def _coordinates(mesh: object, rank: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return where in the mesh a rank is: as it says, else by its number."""
    told = mesh.get("_coordinate_on_dim") if isinstance(mesh, Record) else None
    if isinstance(told, tuple | list) and len(told) == len(sizes) and all(map(is_count, told)):
        return counts(told)
    found = []
    for size in reversed(sizes):
        rank, at = divmod(rank, size)
        found.append(at)
    return tuple(reversed(found))


def _malformed(archive: Archive, got: str) -> FormatError:
    return FormatError(
        "a file of DTensors that is not what its name says",
        where=archive.where,
        expected="the state dict of a sharded model, as verl saves it",
        got=got[:300],
        next_step="fetch the files of all ranks again, of one and the same checkpoint",
    )
