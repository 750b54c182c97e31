"""Checkpoint -> folder: plan which tensor is made of which bytes, then write them.

::

    <output>/config.json, generation_config.json, tokenizer…      from whichever rank has them
    <output>/model.safetensors                                    or shards with their index
    <output>/adapter_config.json, adapter_model.safetensors       where a LoRA was trained
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loader.errors import CheckpointError, ConfigError, UnsupportedError
from loader.types import Checkpoint, Kind
from loader.weights.formats.adapter import has_adapter, match_adapter
from loader.weights.formats.assembly import (
    CASTABLE,
    DTYPE_NAMES,
    Target,
    describe_sources,
    is_same,
)
from loader.weights.formats.dcp import DcpSource
from loader.weights.formats.dtensors import DTensorSource
from loader.weights.formats.expected import ModelNames, read_model_names
from loader.weights.formats.frozen import FROZEN_LEFT_OUT, FilledSource
from loader.weights.formats.hfstorage import SafetensorsStorageSource, is_storage
from loader.weights.formats.layouts import find_view
from loader.weights.formats.pieces import SourceTensor
from loader.weights.formats.places import CONFIG, home_folders, weight_folders
from loader.weights.formats.rank_files import Files, local_files
from loader.weights.formats.ranks import RankShardsSource, has_weights
from loader.weights.formats.refused import find_refusal, optimizer_alone
from loader.weights.formats.sidecars import find_sidecars, write_sidecars
from loader.weights.formats.tensor_names import is_of_model, match_names
from loader.weights.formats.work import Progress, even_shard_bytes, write_all
from loader.weights.formats.zero import ZeroSource
from loader.weights.header import TensorInfo
from loader.weights.quantised import check_plain
from loader.weights.resuming import Digest, ResumableWriter
from loader.weights.writer import (
    MAX_SHARD_BYTES,
    CheckpointWriter,
    ShardPlan,
    TensorSpec,
    plan_shards,
)

Learn = Callable[[Path], ModelNames]
Keep = Callable[[Collection[str]], Collection[str]]
"""Which of a model's tensors are wanted, by their names."""


class ShardedSource(Protocol):
    """The tensors of a sharded checkpoint, whatever its format."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]  # as trained

    def open(self, names: Sequence[str], dtype: str | None) -> tuple[SourceTensor, ...]:
        """Return these tensors as pieces, best read for *dtype* ("BF16"), None as trained.

        Raises:
            CheckpointError: parts that are missing; all are listed.
        """


@dataclass(frozen=True, slots=True)
class Consolidation:
    """What would be written: tensors in order, small files, and what the weight files are called.

    ``dtype`` is what most of it is stored in ("bfloat16"), None where nothing is floating.
    """

    targets: tuple[Target, ...]
    sidecars: Mapping[str, Path]
    stem: str
    dtype: str | None

    @property
    def size_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(target.size_bytes for target in self.targets)


def consolidate(
    checkpoint: Checkpoint,
    output: Path,
    *,
    files: Files | None = None,
    base: Path | None = None,
    names: Mapping[str, tuple[int, ...]] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Progress | None = None,
    on_begin: Callable[[CheckpointWriter], None] = lambda writer: None,
    digest: Digest | None = None,
    learn: Learn = read_model_names,
    keep: Keep | None = None,
) -> Path:
    """Return *output*, a Hugging Face folder (or a PEFT adapter's) made of a sharded checkpoint.

    The folder appears when all of it is written. Tensors are named as the model names them, from
    the checkpoint's config.json, else from the one in *base*; or *names* (name -> shape) are
    expected; *learn* returns those of a folder's config.json. What ZeRO left out of a checkpoint
    because it was frozen comes from the weights in *base*. *files* are the checkpoint's where
    they are not (all) on this disk. ``dtype`` ("bfloat16") casts floating tensors, None leaves them
    as they were trained. ``on_progress(done, total)`` is told of bytes; ``on_begin`` is given the
    writer when all but the weights is written. Some blocks of 8 MiB are in memory at a time.
    With *keep* a part of a model is written, and no byte of the rest is read; it may be whole then.

    With *digest*, a run goes on with what one that ended before its time had written into the
    same *output* by the same plan; then *files* must be of the same version, too.

    Raises:
        CheckpointError: missing ranks or truncated shards (every hole is named by tensor), or
            tensors that are not the model's (all are listed).
        FormatError: a file is not what its format says.
        UnsupportedError: a layout that is known and cannot be consolidated.
        DiskError: no room, or the disk refused.
    """
    code = _dtype_code(dtype)
    with contextlib.ExitStack() as stack:
        if files is None:
            files = stack.enter_context(local_files(weight_folders(checkpoint)))
        weights = stack.enter_context(local_files([base])) if base else None
        plan = plan_consolidation(
            checkpoint, files, base, weights, names=names, dtype=code, learn=learn, keep=keep
        )
        specs = [TensorSpec(t.name, t.dtype, t.source.shape) for t in plan.targets]
        even = min(max_shard_bytes, even_shard_bytes(plan.size_bytes))
        shards = plan_shards(specs, max_shard_bytes=even, stem=plan.stem)
        with _open_writer(output, shards, plan, digest) as writer:
            write_sidecars(plan.sidecars, writer.path, dtype=plan.dtype)
            on_begin(writer)
            write_all(plan.targets, writer, on_progress)
    return output


def _open_writer(
    output: Path, shards: Sequence[ShardPlan], plan: Consolidation, digest: Digest | None
) -> CheckpointWriter:
    if digest is None:
        return CheckpointWriter(output, shards, stem=plan.stem)
    return ResumableWriter(
        output, shards, stem=plan.stem, plan=describe_sources(plan.targets), digest=digest
    )


def plan_consolidation(
    checkpoint: Checkpoint,
    files: Files,
    base: Path | None = None,
    base_files: Files | None = None,
    *,
    names: Mapping[str, tuple[int, ...]] | None = None,
    dtype: str | None = None,
    learn: Learn = read_model_names,
    keep: Keep | None = None,
) -> Consolidation:
    """Return what ``consolidate`` would write; only descriptions of tensors are read.

    ``dtype`` as in "BF16". ``base_files`` are those of *base*, which may lack weights.

    Raises:
        LoaderError: as ``consolidate``, but for the disk.
    """
    where = str(checkpoint.path)
    if checkpoint.kind is Kind.FULL and keep is not None:
        source: ShardedSource = RankShardsSource(files)
        names = {name: shape for name, shape in source.shapes.items() if is_of_model(name)}
    else:
        source = _open_source(checkpoint, files)
    if source.shapes and not any(map(is_of_model, source.shapes)):
        raise optimizer_alone(where, sorted(source.shapes))
    sidecars = find_sidecars(home_folders(checkpoint))
    if has_adapter(source.shapes):
        matched = match_adapter(source.shapes, sidecars, where)
        targets = _targets(matched, source, dtype)
        return Consolidation(targets, sidecars, "adapter_model", _main_dtype(targets))
    if CONFIG not in sidecars and base is not None:
        sidecars = {**find_sidecars([base]), **sidecars}
    expected = ModelNames(names) if names is not None else _expected(sidecars, learn, where)
    if CONFIG in sidecars:
        source = find_view(source, files, sidecars[CONFIG], where) or source
    hint = ""
    if isinstance(source, ZeroSource) and source.lacks_frozen:
        hint = FROZEN_LEFT_OUT
        if base_files is not None and has_weights(base_files):
            source = FilledSource(source, base_files, expected.shapes)
    match = match_names(source.shapes, expected, where, hint)
    kept = match.names.keys() if keep is None else keep(match.names.keys())
    targets = _targets({n: own for n, own in match.names.items() if n in kept}, source, dtype)
    copies = {name: others for name, others in match.copies.items() if name in kept}
    _check_copies(targets, copies, source, dtype, where)
    if checkpoint.kind is not Kind.FULL:
        check_plain(where, {t.name: TensorInfo(t.name, t.dtype, (), 0, 0) for t in targets})
    main = None if checkpoint.kind is Kind.FULL else _main_dtype(targets)
    return Consolidation(targets, sidecars, "model", main)


def _open_source(checkpoint: Checkpoint, files: Files) -> ShardedSource:
    if refusal := find_refusal(checkpoint):
        raise refusal
    if checkpoint.kind is Kind.DCP:
        return SafetensorsStorageSource(files) if is_storage(files) else DcpSource(files)
    if checkpoint.kind is Kind.RANK_SHARDS:
        return RankShardsSource(files)
    if checkpoint.kind is Kind.DTENSOR:
        return DTensorSource(files)
    if checkpoint.kind is Kind.ZERO:
        return ZeroSource(files, str(checkpoint.detail.get("tag", "")))
    raise UnsupportedError(
        "a checkpoint that is not sharded over ranks",
        where=str(checkpoint.path),
        expected="torch.distributed.checkpoint, DeepSpeed ZeRO, DTensors as verl saves them, or "
        "shards spread over ranks",
        got=checkpoint.kind.value,
        next_step="serve it as it is",
    )


def _expected(sidecars: Mapping[str, Path], learn: Learn, where: str) -> ModelNames:
    if CONFIG not in sidecars:
        raise CheckpointError(
            "no rank has the config.json of the model",
            where=where,
            expected=f"{CONFIG} beside the weights on one rank, or a base model's",
            next_step="set base_model to the model that was trained",
        )
    return learn(sidecars[CONFIG].parent)


def _targets(
    names: Mapping[str, str], source: ShardedSource, dtype: str | None
) -> tuple[Target, ...]:
    opened = source.open(list(names.values()), dtype)
    return tuple(
        Target(name, dtype if dtype and tensor.dtype in CASTABLE else source.dtypes[own], tensor)
        for (name, own), tensor in zip(names.items(), opened, strict=True)
    )


def _check_copies(
    targets: Sequence[Target],
    copies: Mapping[str, tuple[str, ...]],
    source: ShardedSource,
    dtype: str | None,
    where: str,
) -> None:
    """Raise CheckpointError where tied tensors were saved twice and are not the same."""
    kept = {target.name: target for target in targets}
    problems = [
        f"{other.name} differs from {kept[name].source.name}"
        for name, others in copies.items()
        for other in source.open(others, dtype)
        if not is_same(kept[name].source, other)
    ]
    if problems:
        raise CheckpointError(
            "tied weights that are not the same",
            where=where,
            problems=problems,
            next_step='if they were trained apart, set "tie_word_embeddings": false in config.json',
        )


def _main_dtype(targets: Sequence[Target]) -> str | None:
    used: Counter[str] = Counter()
    for target in targets:
        if target.dtype in CASTABLE:
            used[DTYPE_NAMES[target.dtype]] += target.size_bytes
    return used.most_common(1)[0][0] if used else None


def _dtype_code(dtype: str | None) -> str | None:
    codes = {name: code for code, name in DTYPE_NAMES.items()}
    if dtype is not None and dtype not in codes:
        raise ConfigError(
            "a dtype that weights cannot be cast to",
            expected=", ".join(sorted(codes)),
            got=dtype,
            next_step="leave it out to keep the weights as they were trained",
        )
    return codes[dtype] if dtype else None
