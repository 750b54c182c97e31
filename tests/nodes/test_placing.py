"""What is reserved: as vLLM does, or every node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loader.config.settings import Settings
from loader.nodes.placing import choose_bundles
from loader.ray_cluster import Node
from loader.types import TrainingCheckpoints

NODES = (Node("a" * 8, "10.0.0.1", "10.0.0.1"), Node("b" * 8, "10.0.0.2", "10.0.0.2"))
ALL = ([{"node:10.0.0.1": 0.001}, {"node:10.0.0.2": 0.001}], "STRICT_SPREAD")


@pytest.mark.parametrize(
    ("arguments", "gpus", "expected"),
    [
        ({}, 8.0, ALL),
        ({"tensor_parallel_size": 8}, 0.0, ALL),
        ({"tensor_parallel_size": "4", "pipeline_parallel_size": 2}, 8.0, 8),
        ({"tensor_parallel_size": 2, "data_parallel_size": 3}, 8.0, 6),
        ({"distributed_executor_backend": "ray"}, 8.0, 1),
        ({"distributed_executor_backend": "mp", "tensor_parallel_size": None}, 8.0, ALL),
    ],
)
def test_the_bundles_are_vllms(arguments: dict[str, Any], gpus: float, expected: Any) -> None:
    settings = Settings(training=TrainingCheckpoints(Path("x"), ()), engine_args=arguments)
    if isinstance(expected, int):
        expected = ([{"GPU": 1.0}] * expected, "PACK")
    assert choose_bundles(settings, NODES, {"CPU": 4.0, "GPU": gpus}) == expected
