"""Adapter + base -> the edits to make, decided from headers and configs alone.

Everything that does not fit is found here, before a weight is read or a file written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from loader.adapters.config import AdapterConfig
from loader.adapters.edits import AddScaled, Edit, LowRank, Replace, ReplaceRows
from loader.adapters.experts import plan_experts
from loader.adapters.methods import plan_method
from loader.adapters.parts import ModuleParts, group_parts
from loader.adapters.plan_builder import Base, Draft, Place, Shapes
from loader.errors import AdapterError, UnsupportedError


@dataclass(frozen=True, slots=True)
class MergePlan:
    """All edits by target, in the order to be made.

    ``origins`` are tensors that the base lacks, with the base's tensor that each starts from;
    ``shapes`` the shapes that change.
    """

    edits: Mapping[str, tuple[Edit, ...]]
    origins: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


def plan_merge(
    config: AdapterConfig, tensors: Shapes, base: Base, *, only_fit: bool = False
) -> MergePlan:
    """Return what the adapter's *tensors* do to *base*; with ``only_fit``, as far as it is known.

    Raises:
        AdapterError: tensors that nothing uses, modules that the base lacks, shapes or ranks that
            do not fit: all are listed.
        UnsupportedError: they fit, and podloader does not know how to merge them.
    """
    draft = Draft(config, base, tensors)
    grouped = group_parts(tensors)
    for module in grouped.modules:
        _plan_whole(draft, module)
        draft.used.update(module.spare)
        if module.parts:
            _plan_parts(draft, module, grouped.shared)
    if config.peft_type == "VERA":
        draft.used.update(grouped.shared.values())
    for name in sorted(set(tensors) - draft.used):
        draft.blame("nothing uses it", name)
    _plan_untying(draft)
    _check_vocabulary(draft)
    if draft.problems:
        raise AdapterError(
            "an adapter that does not fit its base",
            where=str(config.folder),
            expected=f"tensors of the base ({base.model_type or 'no model_type'})",
            problems=draft.problems,
            next_step="give the base that the adapter was trained over: "
            + (config.base_model or "its config does not name it"),
        )
    if draft.unmergeable and not only_fit:
        raise UnsupportedError(
            "an adapter that podloader does not merge into this base",
            where=str(config.folder),
            problems=draft.unmergeable,
            next_step="merge it in the training job, with PEFT's merge_and_unload",
        )
    frozen = {target: tuple(edits) for target, edits in draft.edits.items()}
    return MergePlan(
        MappingProxyType(frozen), MappingProxyType(draft.origins), MappingProxyType(draft.shapes)
    )


def _plan_whole(draft: Draft, module: ModuleParts) -> None:
    for leaf, source in module.whole.items():
        place = draft.find(module.module, leaf) if leaf else None
        if place is None:
            draft.blame(f"the base has no {module.module}.{leaf}".rstrip("."), source)
            continue
        have, got = place.shape, draft.tensors[source].shape
        if have != got:
            # Tokens were added in fine-tuning: both vocabulary tensors may grow or shrink by rows.
            resized = place.is_vocabulary and len(got) == len(have) and got[1:] == have[1:]
            if not resized or place.whole is None:
                draft.blame(f"{got}, the base has {have}", source)
                continue
            draft.shapes[place.whole] = got
        if not _is_shared(draft, place, source):
            draft.add(Replace("", source), place)


def _is_shared(draft: Draft, place: Place, *names: str) -> bool:
    """Say so, and return True, where a change of *place* would be one of several other modules."""
    if place.shared > 1:
        draft.leave(f"{place.name} is one tensor with {place.shared} others of the model", *names)
    return place.shared > 1


def _plan_parts(draft: Draft, module: ModuleParts, shared: Mapping[str, str]) -> None:
    parts = module.parts
    if "tokens" in parts:
        _plan_tokens(draft, module)
    if any(part.startswith("lora_") for part in parts):
        pair = ("lora_embedding_A", "lora_embedding_B")
        a, b = pair if pair[0] in parts or pair[1] in parts else ("lora_A", "lora_B")
        if a not in parts or b not in parts:
            lacks = b if a in parts else a
            draft.blame(f"{lacks} of {module.module} is missing", *parts.values())
            return
        place = draft.find(module.module)
        stacked = place is None or len(place.shape) == 3
        if stacked and draft.config.target_parameters:
            plan_experts(draft, module)
        elif place is None:
            draft.blame(f"the base has no {module.module}.weight", *parts.values())
        elif not _is_shared(draft, place, *parts.values()):
            _plan_low_rank(draft, module, place, parts[a], parts[b], a == pair[0])
    elif set(parts) - {"tokens"}:
        plan_method(draft, module, shared)


def _plan_low_rank(
    draft: Draft, module: ModuleParts, place: Place, a: str, b: str, embedding: bool
) -> None:
    have = place.shape
    shape_a, shape_b = draft.tensors[a].shape, draft.tensors[b].shape
    names = tuple(name for part, name in module.parts.items() if part != "tokens")
    if 0 in (*shape_a, *shape_b) or len(shape_a) < 2 or len(shape_b) < 2:
        draft.blame(f"empty ({shape_a}, {shape_b}): not gathered when they were saved", *names)
        return
    # Source: peft ``tuners/lora/layer.py``, ``ParamWrapper``: the key names the parameter, too.
    is_parameter = _is_target_parameter(draft.config, f"{module.module}.weight")
    key = f"{module.module}.weight" if is_parameter else module.module
    rank = draft.config.rank_of(key)
    if shape_a[0] != shape_b[1] or shape_a[0] != rank:
        draft.blame(f"ranks {shape_a[0]} and {shape_b[1]}, the config says {rank}", *names)
        return
    straight = (shape_b[0], *shape_a[1:])
    turned = embedding or _is_turned(draft, place, straight)
    if have != (straight[::-1] if turned else straight):
        draft.blame(f"change {straight}, the base has {have}", *names)
        return
    magnitude = module.parts.get("lora_magnitude_vector")
    if magnitude and shape_b[0] not in draft.tensors[magnitude].shape:
        draft.blame(f"expected {shape_b[0]} values", magnitude)
    scaling = draft.config.scaling_of(key)
    rounded = embedding or is_parameter
    draft.add(LowRank("", a, b, scaling, turned, magnitude, rounded), place)
    if bias := module.parts.get("lora_B.bias"):
        _plan_lora_bias(draft, module, bias, scaling)


def _is_turned(draft: Draft, place: Place, straight: tuple[int, ...]) -> bool:
    """Return whether the base stores (in, out).

    The class says so. Where there is none in transformers, the shape tells; a square does not, and
    there it is what PEFT itself found out in training and wrote into the config.
    """
    if place.conv1d is not None:
        return place.conv1d
    if straight == straight[::-1]:
        return draft.config.fan_in_fan_out
    return place.shape == straight[::-1]


def _is_target_parameter(config: AdapterConfig, name: str) -> bool:
    return any(name == key or name.endswith(f".{key}") for key in config.target_parameters)


def _plan_lora_bias(draft: Draft, module: ModuleParts, bias: str, scaling: float) -> None:
    place = draft.find(module.module, "bias")
    if place is None:
        draft.blame(f"the base has no {module.module}.bias to take it up", bias)
    elif place.shape != draft.tensors[bias].shape:
        draft.blame(f"other shape than {place.name}", bias)
    else:
        draft.add(AddScaled("", bias, scaling), place)


def _plan_tokens(draft: Draft, module: ModuleParts) -> None:
    source = module.parts["tokens"]
    found = draft.config.extra.get("trainable_token_indices")
    if isinstance(found, dict):
        name = module.module
        found = next((v for k, v in found.items() if name == k or name.endswith(f".{k}")), None)
    rows = tuple(found) if isinstance(found, list) else ()
    place = draft.find(module.module)
    if place is None:
        draft.blame(f"the base has no {module.module}.weight", source)
        return
    have = place.shape
    if draft.tensors[source].shape != (len(rows), *have[1:]):
        draft.blame(f"does not fit {len(rows)} tokens and {have}", source)
    elif not all(type(row) is int and 0 <= row < have[0] for row in rows):
        draft.blame(f"token ids beyond the base's {have[0]} rows", source)
    elif not _is_shared(draft, place, source):
        draft.add(ReplaceRows("", source, rows), place)


def _plan_untying(draft: Draft) -> None:
    """Give the head its own tensor when only one of a tied pair changes.

    Fine-tuning saw them apart: an edit of one did not reach the other. Trained token rows of the
    embedding, and new rows, reach both.
    """
    if draft.tied is None:
        return
    head, tied = draft.tied
    if not draft.origins:
        edits = draft.edits.get(tied, [])
        own = [e for e in edits if not isinstance(e, ReplaceRows) and not _resizes(draft, e)]
        if not own or draft.config.extra.get("ensure_weight_tying"):
            return
        draft.origins[head] = tied
    for name in draft.origins:
        _share_rows(draft, name, tied)
    _write_all_tied(draft)


def _write_all_tied(draft: Draft) -> None:
    """Give every other tensor that is tied a copy of its own: one flag of the config ties all."""
    architecture = draft.base.architecture
    assert architecture is not None
    for name, others in architecture.tied.items():
        stored = next((p for other in others if (p := architecture.pieces.get(other))), ())
        if name not in architecture.pieces and len(stored) == 1:
            draft.origins.setdefault(architecture.stored_name(name), stored[0].tensor)


def _share_rows(draft: Draft, head: str, tied: str) -> None:
    """Let both of a tied pair start from the new rows, and the head from the trained ones."""
    for source, target in ((head, tied), (tied, head)):
        if source not in draft.shapes or target in draft.shapes:
            continue
        first = draft.edits[source][0]
        if isinstance(first, Replace) and first.is_saved_base:
            draft.shapes[target] = draft.shapes[source]
            draft.edits.setdefault(target, []).insert(0, replace(first, target=target))
    edits = draft.edits.get(head, [])
    whole = [edit for edit in edits if isinstance(edit, Replace)]
    has_own_rows = any(isinstance(edit, ReplaceRows) for edit in edits)
    if has_own_rows or not all(edit.is_saved_base for edit in whole):
        return
    rows = [e for e in draft.edits.get(tied, []) if isinstance(e, ReplaceRows)]
    edits[len(whole) : len(whole)] = [replace(edit, target=head) for edit in rows]
    if edits:
        draft.edits[head] = edits


def _resizes(draft: Draft, edit: Edit) -> bool:
    return isinstance(edit, Replace) and edit.target in draft.shapes


def _check_vocabulary(draft: Draft) -> None:
    """Both vocabulary tensors must end with the same number of rows."""
    if not draft.shapes or (architecture := draft.base.architecture) is None:
        return
    ends = [architecture.pieces.get(n or "") for n in (architecture.embedding, architecture.head)]
    names = [pieces[0].tensor for pieces in ends if pieces]
    rows = {name: draft.shape_of(name)[0] for name in (*names, *draft.origins)}
    if len(set(rows.values())) > 1:
        draft.problems.append(
            "; ".join(f"{name}: {count} rows" for name, count in rows.items())
            + ": the adapter resized only one of them"
        )
