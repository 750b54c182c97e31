"""GPUs for a size: the fewest, then the smallest."""

from __future__ import annotations

import pytest
from truss.base.truss_config import Accelerator

from loader.config.values import Bytes, read_value
from loader.errors import ConfigError
from loader.scaffold.gpus import GPUS, Load, place
from loader.serve.size import ModelSize, size_of
from tests.serve.test_size import LLAMA_8B

LOAD = Load(tokens=8192, requests=4)


def sized(billions: float, **more: object) -> ModelSize:
    return size_of(LLAMA_8B | more, int(billions * 2e9), "the test")


def test_the_names_are_those_of_truss() -> None:
    assert {gpu.name for gpu in GPUS} <= {accelerator.value for accelerator in Accelerator}


@pytest.mark.parametrize(
    ("billions", "accelerator"),
    [
        (1, "L4"),
        (8, "H100_40GB"),
        (27, "H100"),
        (50, "H200"),
        (70, "B200"),
        (120, "H200:2"),
        (400, "H200:8"),
    ],
)
def test_the_fewest_then_the_smallest(billions: float, accelerator: str) -> None:
    assert place(sized(billions), LOAD).accelerator == accelerator


def test_longer_requests_need_more() -> None:
    assert place(sized(8), Load(1024, 1)).accelerator == "L4"
    assert place(sized(8), Load(131072, 4)).accelerator == "H200"


def test_what_is_asked_for_is_taken() -> None:
    assert place(sized(8), LOAD, "H100").accelerator == "H100"
    assert place(sized(8), LOAD, "l4").accelerator == "L4:2"
    assert place(sized(1), LOAD, "A100-40GB:4").accelerator == "A100_40GB:4"


def test_no_more_are_chosen_than_an_instance_has() -> None:
    assert place(sized(8), LOAD, "H100_40GB").count == 1
    with pytest.raises(ConfigError, match="does not fit") as error:
        place(sized(27), LOAD, "H100_40GB")
    assert len(error.value.problems) == 1
    assert place(sized(27), LOAD, "H100_40GB:2").count == 2


@pytest.mark.parametrize("asked", ["H1000", "H100:3", "H100:", "H100:0", ""])
def test_unknown_accelerators(asked: str) -> None:
    if not asked:
        assert place(sized(1), LOAD, asked).accelerator == "L4"
        return
    with pytest.raises(ConfigError, match="not known"):
        place(sized(1), LOAD, asked)


def test_what_does_not_fit_says_by_how_much() -> None:
    with pytest.raises(ConfigError, match="does not fit") as error:
        place(sized(70), LOAD, "L4:2")
    assert "needed" in error.value.problems[0]
    assert "21.3 GB usable" in error.value.problems[0]


def test_heads_that_cannot_be_split() -> None:
    odd = sized(8, num_attention_heads=25, num_key_value_heads=5, head_dim=64)
    with pytest.raises(ConfigError) as error:
        place(odd, LOAD, "H100:2")
    assert "25 heads" in error.value.problems[0]
    assert place(odd, LOAD).count == 1


def test_the_calculation_adds_up() -> None:
    found = place(sized(70), Load(8192, 4, rank=16, adapters=2), "H100:4")
    *terms, total = found.calculation
    figures = [_read(line) for line in terms]
    assert _read(total) == pytest.approx(sum(figures), rel=0.01)
    assert figures[0] == pytest.approx(70 * 2e9 / 4, rel=0.01)
    assert "4 requests of 8192 tokens / 4 GPUs" in terms[1]
    assert "2 adapters of rank 16" in terms[2]


def _read(line: str) -> float:
    """Return the bytes that a line of the calculation begins with."""
    return float(read_value(" ".join(line.split()[:2]), Bytes))
