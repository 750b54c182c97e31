"""Which checkpoints are meant."""

from __future__ import annotations

import pytest

from loader.errors import ConfigError
from loader.scaffold.choice import by_step, choose
from loader.scaffold.survey import Found
from loader.types import Kind


def found(name: str, job: str = "j", kind: Kind = Kind.ADAPTER, tag: str = "") -> Found:
    return Found(job, 0, name, kind, {}, None, tag=tag)


THREE = (found("run/checkpoint-9"), found("run/checkpoint-100"), found("run/final"))


def test_the_most_recent_by_step() -> None:
    assert [f.name for f in by_step(THREE)] == [
        "run/checkpoint-100",
        "run/checkpoint-9",
        "run/final",
    ]
    assert choose(THREE, ["latest"]) == (THREE[1],)
    zero = (found("a", kind=Kind.ZERO, tag="global_step7"), found("b", tag="global_step30"))
    assert choose(zero, ["latest"]) == (zero[1],)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-9",
        "run/checkpoint-9",
        "rank-0/run/checkpoint-9",
        "j/run/checkpoint-9",
        "j/checkpoint-9",
        "j/rank-0/run/checkpoint-9",
    ],
)
def test_the_ways_to_name_one(name: str) -> None:
    assert choose(THREE, [name]) == (THREE[0],)


def test_several_adapters_each_once_in_the_order_asked_for() -> None:
    names = ["final", "latest", "checkpoint-9", "j/run/final"]
    assert choose(THREE, names) == (THREE[2], THREE[1], THREE[0])


def test_names_that_mean_none_or_several() -> None:
    with pytest.raises(ConfigError, match="no checkpoint") as error:
        choose(THREE, ["checkpoint-8"])
    assert len(error.value.problems) == 3
    two = (found("a/checkpoint-1"), found("b/checkpoint-1"))
    with pytest.raises(ConfigError, match="2 checkpoints"):
        choose(two, ["checkpoint-1"])


def test_steps_of_two_jobs_are_not_compared() -> None:
    two = (found("checkpoint-1"), found("checkpoint-2", job="k"))
    with pytest.raises(ConfigError, match="different jobs"):
        choose(two, ["latest"])
    assert choose(two, ["k/checkpoint-2", "j/checkpoint-1"]) == (two[1], two[0])


@pytest.mark.parametrize("kind", [Kind.FULL, Kind.WHISPER, Kind.DCP])
def test_only_adapters_go_together(kind: Kind) -> None:
    two = (found("checkpoint-1"), found("checkpoint-2", kind=kind))
    with pytest.raises(ConfigError, match="only adapters"):
        choose(two, ["checkpoint-1", "checkpoint-2"])
    assert choose(two, ["checkpoint-2"]) == (two[1],)
