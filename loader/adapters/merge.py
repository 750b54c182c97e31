"""Base + adapters -> a ready Hugging Face folder, tensor by tensor and published whole.

::

    <output>/*.safetensors            the base's files: same names, same tensors, same order
    <output>/config.json              the base's, with what the merge changed
    <output>/<tokenizer, chat template, generation config>
    <output>/podloader.json           what it was made from

A tensor that no adapter touches is copied inside the kernel; of the others a few rows at a time are
in memory.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

from loader.adapters.apply import Merging, merge_tensors, uncollected
from loader.adapters.combine import (
    Combination,
    WeightedPlan,
    check_ranks,
    combine_plans,
    scale_plan,
)
from loader.adapters.config import AdapterConfig, read_adapter_config
from loader.adapters.edit_plan import MergePlan, plan_merge
from loader.adapters.edits import Edit, LowRank, Replace, ReplaceRows
from loader.adapters.effect import check_effect, check_read
from loader.adapters.fold import Exact
from loader.adapters.plan_builder import Base, check_base_folder, check_roles
from loader.adapters.problems import run_all
from loader.adapters.surroundings import list_surroundings, write_config
from loader.errors import AdapterError, CheckpointError, UnsupportedError
from loader.types import ReadyModel
from loader.weights.dequantise import DequantisedReader
from loader.weights.publishing import disk_error
from loader.weights.quantised import (
    HF_QUANT_CONFIG,
    check_dequantisable,
    check_plain,
    find_packed,
    plain_dtype,
    quantisation_of,
    read_model_config,
)
from loader.weights.readers import MemoryReader, SafetensorsReader, open_weights
from loader.weights.writer import CheckpointWriter, ShardPlan, TensorSpec, plan_shard, plan_shards

PROVENANCE = "podloader.json"
_FLOATS = ("F32", "F16", "BF16", "F64")
_log = logging.getLogger("podloader")

LocalReader = SafetensorsReader | MemoryReader | DequantisedReader


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """An adapter's folder and what its change is multiplied by."""

    folder: Path
    weight: float = 1.0


def merge(
    base: Path,
    adapters: Sequence[WeightedAdapter],
    output: Path,
    *,
    exact: Exact = "float32",
    combine: Combination = "linear",
    dequantise: bool = False,
    allow_pickle: bool = False,
    weights: SafetensorsReader | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_begin: Callable[[CheckpointWriter], None] = lambda writer: None,
    prove: Callable[[], None] = lambda: None,
) -> ReadyModel:
    """Return the merged model in *output*, which appears only when it is complete.

    ``exact="float32"`` rounds once, at the end; ``"peft"`` gives the bits of ``merge_and_unload``.
    ``combine`` is how several adapters become one. With ``dequantise``, the weights of a quantised
    base are merged, and written, as what they stand for. ``weights`` are the base's where they are
    not in its folder: each tensor is merged as it comes. ``on_progress(done_bytes, total_bytes)``;
    ``on_begin`` is given the writer when all but the weights is written; ``prove`` is called when
    all is, and may refuse it.

    Raises:
        AdapterError: an adapter that does not fit its base, is left over, or has no effect.
        UnsupportedError: a quantised base without ``dequantise`` or of a method that it does not
            undo, or an adapter's method that does not fold into weights.
        FormatError: broken files, or pickles without ``allow_pickle``.
        DiskError: no room, or the disk refused.
    """
    _check_output(output)
    check_roles(base, [adapter.folder for adapter in adapters])
    with ExitStack() as stack:
        if weights is None:  # a merge while the base arrives lasts long, and is not alone
            stack.enter_context(uncollected())
        configs, sources = _open_adapters(stack, adapters, allow_pickle)
        _check_mergeable(base, configs)
        about = read_model_config(base)
        reader: LocalReader = weights or _open(stack, base, "model", allow_pickle)
        if quantisation_of(about) is not None:
            reader = _undo(base, reader, about, asked_for=dequantise)
        check_plain(str(base), reader.tensors)
        view = Base(reader.tensors, about)
        plan = _plan(adapters, configs, sources, view, combine)
        _check_dtypes(base, plan, reader)
        beside = list_surroundings(base, [adapter.folder for adapter in adapters])
        provenance = _describe(base, adapters, configs, exact, combine)
        with CheckpointWriter(output, _plan_files(reader, plan)) as writer:
            _write_beside(writer.path, beside, _config_changes(plan, view), provenance)
            on_begin(writer)
            merging = Merging(reader, sources, plan, writer, exact)
            changed = merge_tensors(merging, on_progress)
            if not changed and any(adapter.weight for adapter in adapters):
                raise _without_effect(adapters)
            prove()
    return ReadyModel(output, (), None, output, provenance)


def _check_output(output: Path) -> None:
    if output.exists() and not (output / PROVENANCE).is_file():
        if output.is_dir() and not any(output.iterdir()):
            return
        raise CheckpointError(
            "the output is in the way",
            where=str(output),
            expected="nothing there, or a folder that an earlier merge wrote",
            next_step="remove it, or choose another output",
        )


def _check_mergeable(base: Path, configs: Sequence[AdapterConfig]) -> None:
    if not configs:
        raise AdapterError("no adapter to merge", next_step="name one or more adapters")
    check_base_folder(base, configs[0].base_model)
    obstacles = [f"{c.folder}: {text}" for c in configs for text in c.merge_obstacles()]
    if obstacles:
        raise UnsupportedError(
            "adapters that do not fold into weights",
            problems=obstacles,
            next_step="convert them to plain LoRA with PEFT",
        )


def _without_effect(adapters: Sequence[WeightedAdapter]) -> AdapterError:
    return AdapterError(
        "an adapter that changes nothing: what it adds is lost in rounding",
        problems=[str(adapter.folder) for adapter in adapters],
        expected="other values than the base's in at least one tensor",
        next_step="train it longer, or merge into a base of higher precision",
    )


def _undo(
    base: Path, reader: LocalReader, config: Mapping[str, object], *, asked_for: bool
) -> DequantisedReader:
    """Return *reader* with every weight as it was before it was quantised.

    Raises:
        UnsupportedError: it was not asked for, or the method is none that is undone here.
    """
    stored = isinstance(reader, SafetensorsReader)
    packed = find_packed(config, reader.tensors, reader.read_raw) if stored else {}
    check_dequantisable(str(base), config, reader.tensors, packed, asked_for=asked_for)
    assert isinstance(reader, SafetensorsReader)
    return DequantisedReader(reader, packed, plain_dtype(config))


def _open_adapters(
    stack: ExitStack, adapters: Sequence[WeightedAdapter], allow_pickle: bool
) -> tuple[list[AdapterConfig], list[LocalReader]]:
    """Return their settings and their tensors; what is wrong with any of them is told together."""
    configs: list[AdapterConfig] = []
    sources: list[LocalReader] = []

    def read_config(folder: Path) -> None:
        configs.append(read_adapter_config(folder))

    def open_tensors(folder: Path) -> None:
        sources.append(_open(stack, folder, "adapter_model", allow_pickle))

    run_all(partial(step, a.folder) for a in adapters for step in (read_config, open_tensors))
    return configs, sources


def _open(stack: ExitStack, folder: Path, stem: str, allow_pickle: bool) -> LocalReader:
    reader = open_weights(folder, stem=stem, allow_pickle=allow_pickle)
    if isinstance(reader, SafetensorsReader):
        stack.callback(reader.close)
    return reader


def _plan(
    adapters: Sequence[WeightedAdapter],
    configs: Sequence[AdapterConfig],
    sources: Sequence[LocalReader],
    base: Base,
    combine: Combination,
) -> MergePlan:
    def check(config: AdapterConfig, source: LocalReader) -> MergePlan:
        fits = partial(plan_merge, config, source.tensors, base)
        checks = (partial(check_effect, config),)
        return check_read(fits, checks, config, source.tensors, source.read_raw)

    made = run_all(partial(check, *pair) for pair in zip(configs, sources, strict=True))
    plans = [
        WeightedPlan(str(adapter.folder), adapter.weight, plan)
        for adapter, plan in zip(adapters, made, strict=True)
    ]
    if len(plans) == 1:
        return _keep_tied(scale_plan(plans[0]), sources[0])
    check_ranks([(str(c.folder), c.max_rank) for c in configs], combine)
    return combine_plans(plans, combine)


def _keep_tied(plan: MergePlan, source: LocalReader) -> MergePlan:
    """Leave a head tied when the adapter does the very same to it and to its embedding.

    PEFT saves a tied pair twice, the LoRA of one as the transpose of the other's.
    """
    pairs = [
        pair
        for head, embedding in plan.origins.items()
        for pair in zip_longest(plan.edits.get(head, ()), plan.edits.get(embedding, ()))
    ]
    if not all(_is_same(ours, theirs, source) for ours, theirs in pairs):
        return plan
    edits = {target: made for target, made in plan.edits.items() if target not in plan.origins}
    return replace(plan, edits=edits, origins={})


def _is_same(head: Edit | None, embedding: Edit | None, source: LocalReader) -> bool:
    if isinstance(head, Replace) and isinstance(embedding, Replace):
        return source.read_raw(head.source) == source.read_raw(embedding.source)
    if isinstance(head, ReplaceRows) and isinstance(embedding, ReplaceRows):
        same = source.read_raw(head.source) == source.read_raw(embedding.source)
        return same and head.rows == embedding.rows
    if isinstance(head, LowRank) and isinstance(embedding, LowRank):
        a, b = source.read(head.a), source.read(head.b)
        turned = source.read(embedding.b).T, source.read(embedding.a).T
        plain = not head.magnitude and not embedding.magnitude
        return plain and a.equal(turned[0]) and b.equal(turned[1])
    return False


def _check_dtypes(base: Path, plan: MergePlan, reader: LocalReader) -> None:
    names = [plan.origins.get(target, target) for target in plan.edits]
    odd = [
        f"{n}: {reader.tensors[n].dtype}" for n in names if reader.tensors[n].dtype not in _FLOATS
    ]
    if odd:
        raise UnsupportedError(
            "tensors that cannot take up an adapter",
            where=str(base),
            problems=odd,
            expected=", ".join(_FLOATS),
            next_step="merge into the unquantised model",
        )


def _plan_files(reader: LocalReader, plan: MergePlan) -> tuple[ShardPlan, ...]:
    """Return the files to write: the base's own, with the head that the merge adds if it does."""
    specs: dict[str, list[TensorSpec]] = {}
    for name, info in reader.tensors.items():
        file = "" if isinstance(reader, MemoryReader) else reader.stored[name].path.name
        shape = plan.shapes.get(name, info.shape)
        specs.setdefault(file, []).append(TensorSpec(name, info.dtype, shape))
        for added, origin in plan.origins.items():
            if origin == name and added not in reader.tensors:
                like = plan.shapes.get(added, info.shape)
                specs[file].append(TensorSpec(added, info.dtype, like))
    if list(specs) == [""]:
        return plan_shards(specs[""])
    return tuple(plan_shard(file, of_file) for file, of_file in specs.items())


def _config_changes(plan: MergePlan, base: Base) -> dict[str, object]:
    changes: dict[str, object] = {}
    if plan.origins:
        changes["tie_word_embeddings"] = False
    if plan.shapes:  # of both vocabulary tensors, or of the one that is both
        changes["vocab_size"] = next(iter(plan.shapes.values()))[0]
    return changes


def _describe(
    base: Path,
    adapters: Sequence[WeightedAdapter],
    configs: Sequence[AdapterConfig],
    exact: Exact,
    combine: Combination,
) -> dict[str, object]:
    warnings = []
    for config in configs:
        if not config.may_be_over(base):
            warnings.append(f"{config.folder} was trained over {config.base_model}, not {base}")
            _log.warning("every shape fits, but %s", warnings[-1])
    return {
        "kind": "merged",
        "base": str(base),
        "adapters": [{"folder": str(a.folder), "weight": a.weight} for a in adapters],
        "exact": exact,
        **({"combine": combine} if len(adapters) > 1 else {}),
        **({"warnings": warnings} if warnings else {}),
    }


def _write_beside(
    folder: Path,
    beside: Mapping[str, Path],
    changes: Mapping[str, object],
    provenance: Mapping[str, object],
) -> None:
    try:
        for name, path in beside.items():
            (folder / name).parent.mkdir(exist_ok=True)
            if name == "config.json":
                write_config(path, folder / name, changes)
            elif name not in (PROVENANCE, HF_QUANT_CONFIG):
                shutil.copyfile(path, folder / name)
        text = json.dumps(provenance, indent=2, ensure_ascii=False) + "\n"
        (folder / PROVENANCE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise disk_error(folder, error) from error
