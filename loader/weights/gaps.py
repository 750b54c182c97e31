"""Whether a checkpoint has every tensor that its model needs, told from names and shapes.

An engine does not tell: what vLLM fuses (q, k and v; gate and up; experts) counts as loaded when
any part of it was, and the rest stays what the memory held before. So transformers' own class is
asked, as in ``loader.weights.architecture``. Of one that transformers does not have, layers are
compared with each other.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from loader.weights.architecture import Conversions, Shape, build_model, quietly
from loader.weights.quantised import quantisation_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = Mapping[str, Shape | None]
_log = logging.getLogger("podloader")
# Buffers that count what training did, or that are numbers in order; old checkpoints lack them.
_MADE = re.compile(r"(^|\.)(num_batches_tracked|position_ids|inv_freq|original_inv_freq)$")
# What old checkpoints hold beside the weights: masks and tables that every model makes by itself.
_OLD = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|position_ids|attn\.(masked_)?bias|attention\.(masked_)?bias)$"
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_LAYER = re.compile(
    r"^(?P<stack>.*?\b(?:layers|layer|blocks|block|h))\.(?P<number>\d+)\.(?P<rest>.+)$"
)
_EXPERT = re.compile(r"^(?P<stack>.*\bexperts)\.(?P<number>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True, slots=True)
class Gaps:
    """What a checkpoint lacks of its model, what has another size, and what no model has a use for.

    ``doubts`` are only told: nobody knows the model that they are of.
    """

    missing: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it in JSON's types."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Iterable[str]]) -> Gaps:
        """Return what ``to_json`` was called on."""
        return cls(**{key: tuple(names) for key, names in fields.items()})


def find_gaps(config: Mapping[str, object], shapes: Shapes, *, text_only: bool = False) -> Gaps:
    """Return what a checkpoint of tensors with *shapes* lacks of the model in *config*.

    Quantised weights bear the names that they had before; a shape of None is not looked at. With
    *text_only*, the language model alone is wanted of a model of several parts.

    Raises:
        ImportError: a package that is missing, or that the model needs.
    """
    names = config.get("architectures")
    try:
        model = build_model(config)
    except ImportError:
        raise
    except Exception as error:  # a config may fail in as many ways as there are models
        _log.debug("not compared with its class: %s: %s", type(error).__name__, error)
        return compare_layers(shapes)
    if [type(model).__name__] != names:
        return compare_layers(shapes)
    found = _compare(model, shapes, text_only=text_only)
    if found.missing and found.extra and ("auto_map" in config or _is_another_layout(model, found)):
        # Named as its own code, or vLLM's, names it: transformers would not load it either.
        return compare_layers(shapes)
    if quantisation_of(config) is not None:
        return replace(found, missing=tuple(n for n in found.missing if not _has_other(n, found)))
    return found


def _compare(model: PreTrainedModel, shapes: Shapes, *, text_only: bool) -> Gaps:
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    plain, converted = Conversions(model, model.state_dict()).gather(shapes)
    loaded = {target for target in plain if target in state}
    extra = [name for target, name in plain.items() if target not in state]
    unlike: list[str] = []
    short: list[str] = []
    for target in sorted(loaded):
        shape = shapes[plain[target]]
        if shape is not None and math.prod(shape) != math.prod(state[target]):
            unlike.append(f"{plain[target]}: {list(shape)}, the model has {list(state[target])}")
    for one in converted:
        names = [name for of_pattern in one.names for name in of_pattern]
        targets = [target for target in one.targets if target in state]
        if not targets:
            extra += names
            continue
        loaded.update(targets)
        if any(shapes[name] is None for name in names):
            counts = {len(of_pattern) for of_pattern in one.names}
            is_stack = any(type(op).__name__ == "MergeModulelist" for op in one.operations)
            if is_stack and counts != {state[targets[0]][0]}:
                short += targets
            continue
        given = sum(math.prod(shapes[name] or ()) for name in names)
        needed = sum(math.prod(state[target]) for target in targets)
        if given < needed:
            short += targets
        elif given > needed:
            unlike.append(f"{', '.join(names[:3])}: {given} values, the model has {needed}")
    missing = [*_unloaded(model, state, loaded), *short]
    if text_only:
        decoder, head = quietly(model.get_decoder), quietly(model.get_output_embeddings)
        wanted = {f"{n}." for n, m in model.named_modules() if n and m in (decoder, head)}
        missing = [name for name in missing if name.startswith(tuple(wanted))]
    named = _name_as_stored(model, missing, shapes) if missing else missing
    return Gaps(tuple(named), tuple(unlike), tuple(_unknown(model, extra)))


def _unloaded(
    model: PreTrainedModel, state: Mapping[str, Shape], loaded: Collection[str]
) -> Iterator[str]:
    """Yield what is not *loaded* of *state*, and neither tied to what is nor made by the model."""
    same: dict[int, set[str]] = defaultdict(set)
    for name, tensor in model.state_dict(keep_vars=True).items():
        same[id(tensor)].add(name)
    tied = {name: group for group in same.values() for name in group}
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        both = tied.get(name, {name}) | tied.get(source, {source})
        tied |= dict.fromkeys(both, both)
    patterns = [
        _MADE,
        *map(re.compile, getattr(model, "_keys_to_ignore_on_load_missing", None) or ()),
    ]
    poolers = [
        f"{name}.pooler.".lstrip(".")
        for name, module in model.named_modules()
        if "add_pooling_layer" in inspect.signature(type(module).__init__).parameters
    ]
    absent = tuple(p for p in poolers if not any(name.startswith(p) for name in loaded))
    given = set(loaded)
    for name in state:
        if name in given or tied[name] & given:
            continue
        given.add(name)  # those that are tied to it are told of with it
        if not (name.startswith(absent) or any(p.search(name) for p in patterns)):
            yield name


def _name_as_stored(model: PreTrainedModel, missing: Collection[str], shapes: Shapes) -> list[str]:
    """Return what the checkpoint would call those *missing*, as far as that is known."""
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    try:
        stored = revert_weight_conversion(model, {name: state[name] for name in missing})
    except Exception:  # it is how they are called, and nothing else
        return list(missing)
    return [name for name in stored if name not in shapes] or list(missing)


def _unknown(model: PreTrainedModel, extra: Iterable[str]) -> list[str]:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    known = [_OLD, *map(re.compile, patterns)]
    return [name for name in extra if not any(p.search(name) for p in known)]


def _is_another_layout(model: PreTrainedModel, found: Gaps) -> bool:
    """Return whether what is missing seems to be there, called by other names.

    Where most is missing, or all of it where names that are not known stand beside.
    """
    if len(found.missing) * 2 > len(model.state_dict()):
        return True
    owners = {name.rpartition(".")[0] for name in found.extra}
    above = {owner[:at] for owner in owners for at, c in enumerate(owner + ".") if c == "."}
    return all(name.rpartition(".")[0] in above for name in found.missing)


def _has_other(name: str, found: Gaps) -> bool:
    """Return whether beside *name* lies what only its quantiser knows, which may stand for it."""
    owner = name.rpartition(".")[0]
    beside = {owner, owner.rpartition(".")[0]} - {""}
    owners = {extra.rpartition(".")[0] for extra in found.extra}
    return any(
        n.startswith(f"{owner}.") or n in beside or n.rpartition(".")[0] in beside for n in owners
    )


def compare_layers(shapes: Shapes) -> Gaps:
    """Return what some layers or experts lack and all their siblings have, as doubts.

    A hole in the numbers of experts is no doubt: what is numbered is counted.
    """
    missing: list[str] = []
    doubts: list[str] = []
    for pattern, is_sure in ((_EXPERT, True), (_LAYER, False)):
        stacks: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for name in shapes:
            if match := pattern.match(name):
                rest = _NUMBER.sub("*", match["rest"])
                stacks[match["stack"]][int(match["number"])].add(rest)
        for stack, members in stacks.items():
            lacking = list(_odd_ones(members))
            (missing if is_sure else doubts).extend(f"{stack}.{text}" for text in lacking)
    return Gaps(missing=tuple(missing), doubts=tuple(doubts))


def _odd_ones(members: Mapping[int, set[str]]) -> Iterator[str]:
    """Yield what single members lack of what all others have; and members that are not there."""
    for number in range(max(members) + 1):
        if number not in members:
            yield f"{number}.*"
    counts = Counter(frozenset(names) for names in members.values())
    kinds = sorted(counts, key=lambda names: (counts[names], len(names)))
    if len(kinds) == 2 and counts[kinds[0]] == 1 and kinds[0] < kinds[1]:
        odd = next(number for number, names in members.items() if names == kinds[0])
        yield from (f"{odd}.{rest}" for rest in sorted(kinds[1] - kinds[0]))
