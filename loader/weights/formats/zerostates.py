"""What DeepSpeed's two kinds of files say: names, shapes and where each rank's elements lie.

Source of the keys: deepspeed/checkpoint/constants.py and deepspeed/runtime/engine.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loader.errors import FormatError, UnsupportedError
from loader.weights.formats.archive import Archive
from loader.weights.formats.partitions import Run, Shapes
from loader.weights.formats.pieces import Piece
from loader.weights.formats.records import (
    MOST_RANKS,
    Record,
    TensorRef,
    counts,
    dimensions,
    is_count,
)

_PARTITIONS = ("single_partition_of_fp32_groups", "fp32_flat_groups")  # stages 1 and 2, stage 3


@dataclass(frozen=True, slots=True)
class ModelStates:
    """A ``…model_states.pt``.

    ``shapes`` and ``dtypes`` (as trained) are of all tensors; ``whole`` are those that lie in this
    file entirely, ``groups`` those that are partitioned, in their order, ``frozen`` this rank's
    fragments of those that were not trained, ``shared`` names that are another tensor's.
    ``lacks_frozen``: the latter were not saved (``exclude_frozen_parameters``).
    """

    archive: Archive
    ranks: int
    shapes: Shapes
    dtypes: Mapping[str, str]
    whole: Mapping[str, TensorRef]
    groups: tuple[Shapes, ...]
    frozen: Mapping[str, TensorRef]
    shared: Mapping[str, str]
    lacks_frozen: bool

    def is_partitioned(self, name: str) -> bool:
        """Return whether float32 partitions hold this tensor."""
        return any(name in group for group in self.groups)


@dataclass(frozen=True, slots=True)
class OptimStates:
    """A ``…optim_states.pt``: one float32 run per parameter group; 1-D tensors.

    ``ranks`` is the count of partitions that it says there are.
    """

    archive: Archive
    stage: int
    ranks: int
    groups: tuple[TensorRef, ...]
    paddings: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The elements of each group."""
        return tuple(group.shape[0] for group in self.groups)

    def piece(self, run: Run) -> Piece:
        """Return the bytes of *run*, a part of one of this rank's groups."""
        group = self.groups[run.group]
        start = group.offset + run.start
        part = TensorRef(group.storage, group.dtype, start, (run.count,), (1,))
        return self.archive.piece(part, (run.offset,))


def read_model_states(archive: Archive) -> ModelStates:
    """Return what a ``…model_states.pt`` says.

    Raises:
        FormatError: it is none.
        UnsupportedError: experts or tensors were cut between ranks in other ways.
    """
    try:
        return _read_model(archive, _mapping(archive.value))
    except (ValueError, TypeError) as error:
        raise _malformed(archive, error) from error


def read_optim_states(archive: Archive) -> OptimStates:
    """Return what a ``…optim_states.pt`` says.

    Raises:
        FormatError: it is none.
    """
    try:
        state = _mapping(_mapping(archive.value).get("optimizer_state_dict"))
        stage = _stage(state.get("zero_stage"))
        groups = state.get(_PARTITIONS[stage == 3])
        if not isinstance(groups, list | tuple):
            raise ValueError("no float32 partitions")
        found = tuple(group for group in groups if isinstance(group, TensorRef))
        if len(found) != len(groups) or any(len(group.shape) != 1 for group in found):
            raise ValueError("partitions that are not one-dimensional tensors")
        paddings = state.get("param_alignment_paddings") or ()
        if not isinstance(paddings, list | tuple):
            raise ValueError("param_alignment_paddings that are no lists")
        ranks = _partition_count(state.get("partition_count"))
        return OptimStates(archive, stage, ranks, found, tuple(counts(p) for p in paddings))
    except (ValueError, TypeError) as error:
        raise _malformed(archive, error) from error


def _read_model(archive: Archive, state: Mapping[str, object]) -> ModelStates:
    if experts := [key for key in state if "autoep" in key]:
        raise UnsupportedError(
            "DeepSpeed experts that were cut between ranks",
            where=archive.where,
            got=", ".join(experts),
            next_step="convert it with deepspeed's ds_to_universal.py first",
        )
    module = {k: v for k, v in _mapping(state.get("module")).items() if isinstance(v, TensorRef)}
    listed = state.get("param_shapes") or []
    if not isinstance(listed, list | tuple):
        raise ValueError("param_shapes is no list")
    groups = tuple({n: dimensions(s) for n, s in _mapping(group).items()} for group in listed)
    frozen_shapes = {
        name: dimensions(shape)
        for name, shape in _mapping(state.get("frozen_param_shapes")).items()
    }
    fragments = _mapping(state.get("frozen_param_fragments"))
    frozen = {name: ref for name, ref in fragments.items() if isinstance(ref, TensorRef)}
    shared = {k: str(v) for k, v in _mapping(state.get("shared_params")).items()}
    known = {n: s for group in (*groups, frozen_shapes) for n, s in group.items()}
    shapes = {name: known.get(name, tensor.shape) for name, tensor in module.items()} | known
    shapes |= {alias: shapes[name] for alias, name in shared.items() if name in shapes}
    ranks = state.get("dp_world_size")
    return ModelStates(
        archive,
        ranks if is_count(ranks) and ranks <= MOST_RANKS else 1,
        shapes,
        {name: _dtype(name, module, frozen, shared) for name in shapes},
        {name: tensor for name, tensor in module.items() if tensor.shape == shapes[name]},
        groups,
        frozen,
        shared,
        state.get("frozen_param_shapes") is None,
    )


def _dtype(
    name: str,
    module: Mapping[str, TensorRef],
    frozen: Mapping[str, TensorRef],
    shared: Mapping[str, str],
) -> str:
    """Return the dtype as trained: that of the model's own tensor, though it may be empty."""
    for place in (module, frozen):
        for known in (name, shared.get(name, name)):
            if known in place:
                return place[known].dtype
    return "F32"


def _stage(value: object) -> int:
    if isinstance(value, Record):  # ZeroStageEnum(2)
        value = value.args[0] if value.args else None
    if value not in (1, 2, 3):
        raise ValueError(f"zero_stage {value!r}")
    return int(str(value))


def _partition_count(value: object) -> int:
    """Return the most that a group has, where each has its own: as zero_to_fp32 takes it."""
    given = value if isinstance(value, list | tuple) else [value]
    if not given or not all(is_count(count) and count for count in given):
        raise ValueError(f"partition_count {value!r}")
    if (most := max(counts(given))) > MOST_RANKS:
        raise ValueError(f"a partition_count of {most}")
    return most


def _mapping(value: object) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("no dictionary by name where one belongs")
    return value


def _malformed(archive: Archive, error: Exception) -> FormatError:
    return FormatError(
        "a DeepSpeed file that is not what its name says",
        where=archive.where,
        expected="what DeepSpeed's save_checkpoint writes",
        got=str(error)[:200],
        next_step="fetch the file again, or save the checkpoint again",
    )
