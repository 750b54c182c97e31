"""From a trainer's tensor names to the model's own. Pure.

Wrappers put segments into names, checkpoints put the state dict under a key: both are taken off by
rule, and the rule that explains most of the model's names wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from loader.errors import CheckpointError
from loader.weights.formats.expected import ModelNames

# Segments of wrappers: FSDP1, torch.compile, activation checkpointing.
_WRAPPERS = re.compile(
    r"(^|(?<=\.))(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|_forward_module)\."
)
# What comes before the model's own names: a state dict's key, DataParallel, Lightning, an app.
_LEADS = (
    "",
    "model.",
    "module.",
    "state_dict.",
    "app.",
    "app.model.",
    "model.module.",
    "model_state_dict.",
    "_forward_module.",
    "policy.",
    "actor.",
)
# First segments of what trainers keep beside the model.
_NOT_MODEL = re.compile(
    r"^(app\.|chained_\d+\.)?(optimizer|optim|optimizer_states?|optimizers|lr_scheduler|scheduler|train_state|"
    r"dataloader|rng|rng_state|ema|extra_state|trainer|loops|callbacks|step|epoch)(\.|$)"
)
# Tables of rotary embeddings, which every model computes from its config; some trainers save them.
_COMPUTED = re.compile(
    r"(^|\.)(freqs_cis|freqs_(cos|sin)|rope_cache|(cos|sin)_cached|rotary_emb\.inv_freq|"
    r"(pos_embeddings|rope)\.(theta|cache))$"
)


@dataclass(frozen=True, slots=True)
class Match:
    """Model name -> name in the checkpoint; ``tied``: model name -> the same tensor's names."""

    names: Mapping[str, str]
    copies: Mapping[str, tuple[str, ...]]


def strip_wrappers(name: str) -> str:
    """Return *name* without the segments that wrappers put in."""
    return _WRAPPERS.sub("", name)


def is_of_model(name: str) -> bool:
    """Return whether *name* may be a tensor of the model: not the optimizer's, RNG's and so on.

    Nor is a buffer that the model makes by itself.
    """
    return not (_NOT_MODEL.match(name) or _COMPUTED.search(name))


def match_names(
    found: Mapping[str, tuple[int, ...]], expected: ModelNames, where: str, hint: str = ""
) -> Match:
    """Return which tensor of the checkpoint is which of the model; *found*: name -> shape.

    *hint* says why tensors may be missing, and what to do then.

    Of tied tensors one is given, the one that the others are tied to; ``copies`` names the rest
    that the checkpoint holds as well.

    Raises:
        CheckpointError: tensors missing, unexpected or of another shape; all are listed.
    """
    candidates = {name: strip_wrappers(name) for name in found if is_of_model(name)}
    rule = _best_rule(candidates.values(), expected)
    by_model = {rule.apply(bare): name for name, bare in candidates.items()}
    unexpected = [
        name
        for model_name, name in by_model.items()
        if model_name not in expected.shapes and not expected.is_droppable(model_name)
    ]
    names: dict[str, str] = {}
    copies: dict[str, tuple[str, ...]] = {}
    missing = []
    for group in _tied_groups(expected):
        held = [by_model[member] for member in group if member in by_model]
        if not held:
            missing.append(group[0])
            continue
        names[group[0]] = held[0]
        if len(held) > 1:
            copies[group[0]] = tuple(held[1:])
    shaped = [
        f"{name}: {list(found[source])}, the model has {list(expected.shapes[name])}"
        for name, source in names.items()
        if found[source] != expected.shapes[name]
    ]
    known = [name for name in by_model if name in expected.shapes]
    _refuse(where, missing, unexpected, shaped, known, hint if missing else "")
    return Match(MappingProxyType(names), MappingProxyType(copies))


@dataclass(frozen=True, slots=True)
class _Rule:
    """Take *lead* off where it is, put *add* on."""

    lead: str
    add: str

    def apply(self, name: str) -> str:
        return self.add + name.removeprefix(self.lead)


def _best_rule(names: Iterable[str], expected: ModelNames) -> _Rule:
    names = tuple(names)
    adds = ("", f"{expected.prefix}.") if expected.prefix else ("",)
    rules = [_Rule(lead, add) for add in adds for lead in _LEADS]

    def explained(rule: _Rule) -> int:
        return len({rule.apply(name) for name in names} & expected.shapes.keys())

    return max(rules, key=explained)  # the first of equals: the least change


def _tied_groups(expected: ModelNames) -> list[list[str]]:
    """Return the model's names in order, tied ones together, the one that is kept first."""
    groups: dict[str, list[str]] = {name: [name] for name in expected.shapes}
    for name, source in expected.tied.items():
        if name in groups and source in groups and name != source:
            groups[source] += groups.pop(name)
    return list(groups.values())


def _refuse(
    where: str,
    missing: Sequence[str],
    unexpected: Sequence[str],
    shaped: Sequence[str],
    known: Sequence[str],
    hint: str,
) -> None:
    problems = [
        *(f"missing: {name}" for name in missing),
        *(f"unexpected: {name}" for name in unexpected),
        *(f"another shape: {text}" for text in shaped),
    ]
    if problems:
        raise CheckpointError(
            "a sharded checkpoint that is not the model its config.json describes",
            where=where,
            expected=f"{len(known) + len(missing)} tensors of the model",
            got=f"{len(known)} of them, {len(missing)} missing, {len(unexpected)} unexpected, "
            f"{len(shaped)} of another shape",
            problems=problems,
            next_step=hint
            or "give the folders of all ranks, and the config.json of the model that was trained",
        )
