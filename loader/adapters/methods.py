"""The other PEFT methods that fold into weights: IA3, LoHa, LoKr, VeRA."""

from __future__ import annotations

import math
from collections.abc import Mapping

from loader.adapters.edits import Factored, Multiply
from loader.adapters.parts import ModuleParts
from loader.adapters.plan_builder import Draft, Place

_METHODS = {"hada_": "LOHA", "lokr_": "LOKR", "vera_": "VERA"}


def plan_method(draft: Draft, module: ModuleParts, shared: Mapping[str, str]) -> None:
    """Take the edits of one module into *draft*, or say why they do not fit."""
    place = draft.find(module.module)
    names = tuple(module.parts.values())
    if place is None or place.shared > 1:
        draft.blame(f"the base has no {module.module}.weight of its own", *names)
    elif "ia3_l" in module.parts:
        _plan_ia3(draft, module, place)
    else:
        _plan_factored(draft, module, place, shared)


def _plan_ia3(draft: Draft, module: ModuleParts, place: Place) -> None:
    source = module.parts["ia3_l"]
    rows, columns = (*draft.tensors[source].shape, 0, 0)[:2]
    have = place.shape
    turned = bool(place.conv1d)
    straight = have[::-1] if turned else have
    # Source: peft tuners/ia3/layer.py: (1, in) scales what goes in, (out, 1) what comes out.
    feeds = rows == 1 and straight[1:] == (columns,)
    if not (feeds or (columns == 1 and straight[:1] == (rows,))):
        draft.blame(f"factors {(rows, columns)} for a weight of {have}", source)
        return
    draft.add(Multiply("", source, feeds is not turned), place)
    bias = None if feeds else draft.find(module.module, "bias")
    if bias is not None:
        draft.add(Multiply("", source, False), bias)


def _plan_factored(
    draft: Draft, module: ModuleParts, place: Place, shared: Mapping[str, str]
) -> None:
    parts = module.parts
    method = next((m for prefix, m in _METHODS.items() if prefix in next(iter(parts))), "")
    if method == "VERA" and set(shared) != {"vera_A", "vera_B"}:
        draft.blame("vera_A and vera_B were not saved (save_projection)", *parts.values())
        return
    whole = dict(parts) | (dict(shared) if method == "VERA" else {})
    shapes = {part: draft.tensors[name].shape for part, name in whole.items()}
    have = place.shape
    turned = method == "VERA" and bool(place.conv1d)
    try:
        fits = _fits(method, shapes, have[::-1] if turned else have)
    except (KeyError, IndexError):
        draft.blame(f"not all parts of {method}", *parts.values())
        return
    if not fits:
        draft.blame(f"{method} of other shapes than the base's {have}", *parts.values())
        return
    config = draft.config
    scaling = 1.0 if method == "VERA" else config.scaling_of(module.module)
    draft.add(Factored("", method, tuple(sorted(whole.items())), scaling, turned), place)


def _fits(method: str, shapes: Mapping[str, tuple[int, ...]], have: tuple[int, ...]) -> bool:
    """Return whether the product of the parts has the values of a weight of shape *have*."""
    if method == "VERA":
        a, b = shapes["vera_A"], shapes["vera_B"]
        rank, out = shapes["vera_lambda_d"][0], shapes["vera_lambda_b"][0]
        return rank == a[0] == b[1] and out == have[0] <= b[0] and have[1] <= a[1]
    if method == "LOHA":
        first, last = shapes["hada_w1_a"], shapes["hada_w1_b"]
        if "hada_t1" in shapes:
            return first[1] * last[1] * math.prod(shapes["hada_t1"][2:]) == math.prod(have)
        return first[0] * last[1] == math.prod(have)
    kernel = math.prod(shapes["lokr_t2"][2:]) if "lokr_t2" in shapes else 1
    size = _block_size("lokr_w1", shapes, 1) * _block_size("lokr_w2", shapes, kernel)
    return size == math.prod(have)


def _block_size(name: str, shapes: Mapping[str, tuple[int, ...]], kernel: int) -> int:
    if name in shapes:
        return math.prod(shapes[name])
    a, b = shapes[f"{name}_a"], shapes[f"{name}_b"]
    return a[1] * b[1] * kernel if kernel > 1 else a[0] * math.prod(b[1:])
