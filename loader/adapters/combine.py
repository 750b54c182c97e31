"""Several adapters, each with a weight, as one plan. Tensor names get ``<number>:`` before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from loader.adapters.edit_plan import MergePlan
from loader.adapters.edits import CombinedLowRank, Edit, ExpertLowRank, LowRank, Replace
from loader.errors import AdapterError

Combination = Literal["linear", "cat"]


@dataclass(frozen=True, slots=True)
class WeightedPlan:
    """The plan of one adapter, its weight, and the name to give it in errors."""

    name: str
    weight: float
    plan: MergePlan


def scale_plan(weighted: WeightedPlan) -> MergePlan:
    """Return the plan of a single adapter with its change multiplied by the weight.

    Raises:
        AdapterError: a weight other than 1 over edits that are not plain LoRA.
    """
    if weighted.weight == 1:
        return weighted.plan
    odd = sorted(
        f"{target}: {type(edit).__name__}"
        for target, edits in weighted.plan.edits.items()
        for edit in edits
        if not _is_plain(edit) and not isinstance(edit, ExpertLowRank)
    )
    if odd:
        raise _not_plain(odd)
    scaled = {
        target: tuple(_scale(edit, weighted.weight) for edit in edits)
        for target, edits in weighted.plan.edits.items()
    }
    return replace(weighted.plan, edits=scaled)


def _scale(edit: Edit, weight: float) -> Edit:
    if isinstance(edit, LowRank | ExpertLowRank):
        return replace(edit, scaling=edit.scaling * weight)
    return edit


def combine_plans(plans: Sequence[WeightedPlan], how: Combination) -> MergePlan:
    """Return one plan for several adapters; ``how`` as in PEFT's ``add_weighted_adapter``.

    "linear" adds up the A and the B matrices, each by the root of its weight; "cat" adds up the
    changes themselves.

    Raises:
        AdapterError: anything but plain LoRA, or for "linear" ranks that differ (all are listed).
    """
    odd = []
    found: dict[str, list[tuple[int, float, LowRank]]] = {}
    for number, weighted in enumerate(plans):
        for target, edits in weighted.plan.edits.items():
            for edit in edits:
                if isinstance(edit, LowRank) and _is_plain(edit):
                    found.setdefault(target, []).append((number, weighted.weight, edit))
                elif not _is_saved_base(edit, weighted.plan):
                    odd.append(f"{weighted.name}: {target}: {type(edit).__name__}")
    if odd:
        raise _not_plain(sorted(odd))
    joined = {target: (_join(target, members, how),) for target, members in found.items()}
    origins = {k: v for weighted in plans for k, v in weighted.plan.origins.items()}
    return MergePlan(joined, origins, {})


def check_ranks(ranks: Sequence[tuple[str, int]], how: Combination) -> None:
    """Raise AdapterError when adapters of different ranks are to be added up matrix by matrix."""
    if how == "linear" and len({rank for _, rank in ranks}) > 1:
        raise AdapterError(
            "adapters of different ranks do not combine linearly",
            problems=[f"{name}: rank {rank}" for name, rank in ranks],
            expected="one rank for all",
            next_step='combine with "cat", which adds up their changes',
        )


def _join(target: str, members: list[tuple[int, float, LowRank]], how: Combination) -> Edit:
    factors = [weight * edit.scaling for _, weight, edit in members]
    if how == "cat":
        scale_a, scale_b = factors, [1.0 for _ in factors]
    else:
        # The sign goes to one side only, else two negative roots would cancel.
        scale_a = [math.copysign(math.sqrt(abs(f)), f) for f in factors]
        scale_b = [math.sqrt(abs(f)) for f in factors]
    return CombinedLowRank(
        target,
        tuple(f"{number}:{edit.a}" for number, _, edit in members),
        tuple(f"{number}:{edit.b}" for number, _, edit in members),
        tuple(scale_a),
        tuple(scale_b),
        how == "cat",
        members[0][2].transposed,
    )


def _is_plain(edit: Edit) -> bool:
    return isinstance(edit, LowRank) and edit.magnitude is None


def _is_saved_base(edit: Edit, plan: MergePlan) -> bool:
    return isinstance(edit, Replace) and edit.is_saved_base and edit.target not in plan.shapes


def _not_plain(problems: list[str]) -> AdapterError:
    return AdapterError(
        "only plain LoRA can be weighted or combined",
        problems=problems,
        next_step="merge such an adapter alone and with weight 1",
    )
