"""Which nodes prepare: those of a placement group, which is vLLM's where vLLM would make one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from loader.config.settings import Settings
from loader.errors import NodeError
from loader.ray_cluster import Node, living_nodes
from loader.stores.base import Progress

PLACEMENT_TIMEOUT_S = 1800.0  # vLLM's own PG_WAIT_TIMEOUT
_LOOK_S = 0.5
_DEVICE = "GPU"
_SIZES = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "prefill_context_parallel_size",
    "data_parallel_size",
)
Bundles = Sequence[dict[str, float]]


@dataclass(frozen=True, slots=True)
class Place:
    """A node, and what has Ray start an actor in the group's part of it."""

    node: Node
    strategy: Any


@contextlib.contextmanager
def placed(
    settings: Settings, group: Any | None, ray: Any, progress: Progress, timeout_s: float
) -> Iterator[tuple[Place, ...]]:
    """Give a place on each node of *group*; without one a group is made, for the block.

    Raises:
        NodeError: the cluster has no room for it in time, or nodes of it are gone.
    """
    if group is not None:
        _wait_until_placed(group, group.bundle_specs, ray, progress, timeout_s)
        yield _places(group, ray)
        return
    bundles, strategy = choose_bundles(settings, living_nodes(), ray.cluster_resources())
    group = ray.util.placement_group(bundles, strategy=strategy)
    try:
        _wait_until_placed(group, bundles, ray, progress, timeout_s)
        yield _places(group, ray)
    finally:
        ray.util.remove_placement_group(group)


def choose_bundles(
    settings: Settings, nodes: Sequence[Node], resources: dict[str, float]
) -> tuple[Bundles, str]:
    """Return what to reserve, and how it is spread.

    vLLM over several devices reserves one for each rank and has them packed
    (``vllm/v1/executor/ray_utils.py``); so it is where the cluster has such. Else every node is
    taken as it is.
    """
    arguments = settings.engine_args
    ranks = prod(max(1, int(arguments.get(name) or 1)) for name in _SIZES)
    is_ray = arguments.get("distributed_executor_backend") == "ray"
    if (ranks > 1 or is_ray) and resources.get(_DEVICE):
        return [{_DEVICE: 1.0} for _ in range(ranks)], "PACK"
    return [{f"node:{node.address}": 0.001} for node in nodes], "STRICT_SPREAD"


def _wait_until_placed(
    group: Any, bundles: Bundles, ray: Any, progress: Progress, timeout_s: float
) -> None:
    until, ready = time.monotonic() + timeout_s, group.ready()
    while not ray.wait([ready], timeout=_LOOK_S)[0]:
        free = ray.available_resources()
        wanted = {name for bundle in bundles for name in bundle}
        have = ", ".join(f"{name}: {free.get(name, 0):g} free" for name in sorted(wanted))
        if time.monotonic() > until:
            raise NodeError(
                "the cluster has no room for the model's nodes",
                expected=f"a placement group of {len(bundles)} bundles",
                got=have,
                next_step="`ray status` says who has them",
            )
        progress.wait_for(f"a placement group of {len(bundles)} bundles ({have})")
    progress.wait_for("")


def _places(group: Any, ray: Any) -> tuple[Place, ...]:
    """Return the first place on each node of *group*."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    by_id = {node.id: node for node in living_nodes()}
    found: dict[str, int] = {}
    where = ray.util.placement_group_table(group)["bundles_to_node_id"]
    for bundle, id_ in sorted(where.items()):
        found.setdefault(id_, bundle)
    if gone := [id_ for id_ in found if id_ not in by_id]:
        raise NodeError("nodes of the placement group are gone", got=", ".join(gone))
    return tuple(
        Place(by_id[id_], PlacementGroupSchedulingStrategy(group, bundle))
        for id_, bundle in found.items()
    )
