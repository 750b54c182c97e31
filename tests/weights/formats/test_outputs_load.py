"""What ``consolidate`` writes is loaded by vLLM, every value of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from loader.weights.formats.consolidation import consolidate
from tests.serve.vllm.loaded_outputs import WHOLE, Loaded, load_in_vllm
from tests.weights.formats import test_dcp, test_dtensors, test_zero
from tests.weights.formats.conftest import found

CASES = [
    *(f"fsdp/{case}" for case in (*test_dcp.MODELS, "hf-storage")),
    *(f"zero/{case}" for case in test_zero.TRAINED),
    *(f"verl/{case}" for case in test_dtensors.CASES),
    *(f"megatron/{case}" for case in ("torch-dist", "numbered", "pipeline")),
    *(f"trainer/{case}" for case in ("trainer", "accelerate", "accelerate-full")),
]


@pytest.fixture(scope="module")
def told(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Loaded]:
    """What vLLM says of each."""
    root = tmp_path_factory.mktemp("consolidated")
    made = {}
    for case in CASES:
        framework, _, name = case.partition("/")
        folder: Path = request.getfixturevalue(framework)
        lacks_config = framework == "trainer"  # whose fixture is one of its cases
        made[case] = consolidate(
            found(folder.parent / name if lacks_config else folder / name),
            root / case,
            base=base if lacks_config else None,
        )
    answers = load_in_vllm([(output, None) for output in made.values()])
    return dict(zip(made, answers, strict=True))


@pytest.mark.engine
@pytest.mark.parametrize("case", CASES)
def test_whole(told: dict[str, Loaded], case: str) -> None:
    assert told[case] == WHOLE
