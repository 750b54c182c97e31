"""DeepSpeed ZeRO 1, 2, 3 and the universal format -> tensors as pieces.

::

    <rank 0>/<tag>/mp_rank_00_model_states.pt                        stages 1, 2: the model, whole
    <rank r>/<tag>/zero_pp_rank_<r>_mp_rank_00_model_states.pt       stage 3: names, frozen parts
    <rank r>/<tag>/[bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt    float32 partitions
    <any>/<tag>_universal/zero/<tensor>/fp32.pt                      universal: float32, whole

As trained, the model states are taken where they are whole. Otherwise the float32 partitions are,
and of the optimizer files nothing else is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from loader.errors import CheckpointError, FormatError, UnsupportedError
from loader.weights.formats.archive import Archive
from loader.weights.formats.partitions import Run, cut_each, cut_flattened
from loader.weights.formats.pieces import Piece, SourceTensor, find_holes
from loader.weights.formats.rank_files import Files
from loader.weights.formats.records import MOST_RANKS, TensorRef
from loader.weights.formats.zerochecks import check_partitions, other_run, refuse_many_absent
from loader.weights.formats.zerostates import (
    ModelStates,
    OptimStates,
    read_model_states,
    read_optim_states,
)

_MODEL = re.compile(r"^(zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt$")
_OPTIM = re.compile(r"^(\w+_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt$")
_UNIVERSAL = re.compile(r"^zero/(?P<name>[^/]+)/fp32\.pt$")
_PIPELINE = re.compile(r"^layer_\d+-\w+\.pt$|_expert_\d+_")
_OPENED_AT_ONCE = 8
States = TypeVar("States", ModelStates, OptimStates)


class ZeroSource:
    """The tensors of a ZeRO checkpoint; *tag* is the folder inside ("global_step10")."""

    def __init__(self, files: Files, tag: str) -> None:
        names = [n.removeprefix(f"{tag}/") for n in files.names if n.startswith(f"{tag}/")]
        _refuse_parallel(names, tag)
        self._files, self._tag = files, tag
        self._models = _by_rank(filter(None, map(_MODEL.match, names)), tag)
        self._optim = _by_rank(filter(None, map(_OPTIM.match, names)), tag)
        self._universal = {m["name"]: m.string for m in map(_UNIVERSAL.match, names) if m}
        if not self._models:
            raise CheckpointError(
                "no rank has the model states, which name the tensors",
                where=tag,
                expected="…model_states.pt",
                got=", ".join(sorted(names)[:8]) or "nothing",
                next_step="fetch the folders of all ranks, rank-*/<checkpoint>/",
            )
        self._states = read_model_states(self._archive(self._models[min(self._models)]))
        self.shapes: Mapping[str, tuple[int, ...]] = self._states.shapes
        self.dtypes: Mapping[str, str] = self._states.dtypes
        self.lacks_frozen = self._states.lacks_frozen

    def open(self, names: Sequence[str], dtype: str | None) -> tuple[SourceTensor, ...]:
        """Return the tensors of these names: as trained, or float32 where *dtype* is another.

        Raises:
            CheckpointError: partitions that no rank's folder holds; every hole is listed.
        """
        states = self._states
        owners = [states.shared.get(name, name) for name in names]
        made: dict[str, SourceTensor] = {}
        for name in owners:
            tensor = states.whole.get(name)
            if tensor and (dtype in (None, tensor.dtype) or not states.is_partitioned(name)):
                piece = states.archive.piece(tensor)
                made[name] = SourceTensor(name, tensor.dtype, tensor.shape, tensor.shape, (piece,))
        rest = [name for name in dict.fromkeys(owners) if name not in made]
        if self._universal:
            made |= {name: self._read_universal(name) for name in rest}
        elif rest:
            made |= self._join(rest)
        if problems := [hole for tensor in made.values() for hole in find_holes(tensor)]:
            raise _holes(self._tag, problems)
        return tuple(made[name] for name in owners)

    def _read_universal(self, name: str) -> SourceTensor:
        if name not in self._universal:
            raise _holes(self._tag, [f"{name}: no rank has zero/{name}/fp32.pt"])
        archive = self._archive(self._universal[name])
        value = archive.value
        tensor = value.get("param") if isinstance(value, dict) else value
        shape = self.shapes[name]
        if not isinstance(tensor, TensorRef) or math.prod(tensor.shape) != math.prod(shape):
            raise FormatError(
                "an fp32.pt without its tensor",
                where=archive.where,
                expected=f"a tensor of {list(shape)}",
                got=str(list(tensor.shape)) if isinstance(tensor, TensorRef) else "none",
                next_step="convert the checkpoint again with deepspeed's ds_to_universal.py",
            )
        pieces = (archive.piece(tensor),)
        return SourceTensor(name, tensor.dtype, shape, tensor.shape, pieces)

    def _join(self, names: Sequence[str]) -> dict[str, SourceTensor]:
        """Return tensors made of all ranks' partitions, and of frozen parts where there are."""
        states = self._states
        frozen = [name for name in names if name in states.frozen]
        trained = [name for name in names if name not in states.frozen]
        pieces: dict[str, list[Piece]] = {name: [] for name in names}
        problems: list[str] = []
        if trained:
            found = self._read_ranks(self._optim, read_optim_states, "optim_states")
            optim = check_partitions(states, found, self._tag)
            runs = _cut(states, optim, self._tag)
            for name in trained:
                for run in runs.get(name, ()):
                    rank = optim[run.rank]
                    if isinstance(rank, str):
                        problems.append(f"{_elements(name, run)}: {rank}")
                    else:
                        pieces[name].append(rank.piece(run))
        if frozen:
            refuse_many_absent(len(self._models), states.ranks, self._tag)
            models = self._read_ranks(self._models, read_model_states, "model_states")
            for name in frozen:
                for run in _cut_frozen(states.shapes[name], states.ranks):
                    rank_states = models[run.rank]
                    if isinstance(rank_states, str):
                        problems.append(f"{_elements(name, run)}: {rank_states}")
                    else:
                        pieces[name].append(_frozen_piece(rank_states, name, run, states))
        if problems:
            raise _holes(self._tag, problems)
        return {name: self._flat(name, found) for name, found in pieces.items()}

    def _flat(self, name: str, pieces: Sequence[Piece]) -> SourceTensor:
        shape = self.shapes[name]
        dtype = pieces[0].dtype if pieces else "F32"
        return SourceTensor(name, dtype, shape, (math.prod(shape),), tuple(pieces))

    def _read_ranks(
        self, names: Mapping[int, str], read: Callable[[Archive], States], what: str
    ) -> list[States | str]:
        """Return every rank's states, or why there are none."""
        ranks = range(max(self._states.ranks, max(names, default=-1) + 1))

        def look(rank: int) -> States | str:
            try:
                return read(self._archive(names[rank]))
            except FormatError as error:
                return f"{names[rank]}: {error.what}: {error.got}"

        with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
            found = dict(zip(names, pool.map(look, names), strict=True))
        absent = f"no rank has …zero_pp_rank_{{}}_mp_rank_00_{what}.pt"
        return [found[rank] if rank in found else absent.format(rank) for rank in ranks]

    def _archive(self, name: str) -> Archive:
        return Archive(self._files.open(f"{self._tag}/{name}"))


def _cut(
    states: ModelStates, ranks: Sequence[OptimStates | str], tag: str
) -> Mapping[str, Sequence[Run]]:
    """Return where the ranks' partitions hold which tensor.

    Raises:
        CheckpointError: no rank has its partition.
    """
    known = [rank for rank in ranks if isinstance(rank, OptimStates)]
    if not known:
        names = [name for group in states.groups for name in group]
        raise _holes(tag, [f"{name}: {ranks[0]}" for name in names])
    first = known[0]
    if first.stage == 3:
        shapes = {name: shape for group in states.groups for name, shape in group.items()}
        return cut_each(shapes, first.sizes, len(ranks))
    groups = range(len(states.groups))
    # Partitions are of one size, but for the last rank's, whose padding may not have been saved.
    usual = [max(rank.sizes[group] for rank in known) for group in groups]
    sizes = [
        [rank.sizes[g] if isinstance(rank, OptimStates) else usual[g] for rank in ranks]
        for g in groups
    ]
    return cut_flattened(states.groups, first.paddings, sizes)


def _cut_frozen(shape: tuple[int, ...], ranks: int) -> Sequence[Run]:
    total = math.prod(shape)
    return cut_each({"": shape}, [math.ceil(total / ranks)], ranks)[""]


def _frozen_piece(states: ModelStates, name: str, run: Run, first: ModelStates) -> Piece:
    """Return a rank's part of a frozen parameter, whose shape the *first* rank's states tell."""
    fragment = states.frozen.get(name)
    count = math.ceil(math.prod(first.shapes[name]) / first.ranks)
    if fragment is None or math.prod(fragment.shape) != count:
        raise FormatError(
            "a rank without its part of a frozen parameter",
            where=f"{states.archive.where}: {name}",
            expected=f"{count} elements, the parameter cut between {first.ranks} ranks",
            got=f"{math.prod(fragment.shape)} elements" if fragment else "none",
            next_step="leave out the files that another run wrote under this tag",
        )
    part = TensorRef(fragment.storage, fragment.dtype, fragment.offset, (run.count,), (1,))
    return states.archive.piece(part, (run.offset,))


def _by_rank(matches: Iterable[re.Match[str]], tag: str) -> dict[int, str]:
    """Return rank -> file.

    Raises:
        CheckpointError: two files are of one rank: an earlier run saved in another stage or dtype.
    """
    found: dict[int, str] = {}
    problems = []
    for match in matches:
        rank = int(match["rank"] or 0)
        if rank > MOST_RANKS:
            problems.append(f"{match.string}: no job has a rank {rank}")
        if other := found.get(rank):
            problems.append(f"rank {rank}: {other} and {match.string}")
        found[rank] = match.string
    if problems:
        raise other_run(tag, problems)
    return found


def _elements(name: str, run: Run) -> str:
    return f"{name} elements [{run.offset}:{run.offset + run.count}]"


def _refuse_parallel(names: Sequence[str], tag: str) -> None:
    """Raise UnsupportedError for tensors that were cut by model or pipeline parallelism."""
    matches = [m for m in (_MODEL.match(n) or _OPTIM.match(n) for n in names) if m]
    ranks = {int(m["mp"]) for m in matches}
    pipeline = sorted(name for name in names if _PIPELINE.search(name))
    if len(ranks) < 2 and not pipeline:
        return
    raise UnsupportedError(
        "a DeepSpeed checkpoint of a model that was itself cut between ranks (Megatron-style "
        "tensor, pipeline or expert parallelism)",
        where=tag,
        expected="mp_rank_00 alone: data parallelism only",
        got=", ".join(pipeline[:4]) or f"tensor-parallel ranks {sorted(ranks)}",
        next_step="convert it in the training job; which dimension of which tensor was cut is "
        "known to the training code only",
    )


def _holes(tag: str, problems: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        "parts of tensors that no rank's folder holds",
        where=tag,
        problems=problems,
        next_step="fetch the folders of all ranks, rank-*/<checkpoint>/; if they are there, the "
        "upload of one was cut short",
    )
