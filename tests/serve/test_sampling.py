"""Sampling parameters of the transformers engine."""

from __future__ import annotations

from typing import Any

import pytest

from loader.errors import RequestError
from loader.serve.sampling import read_sampling


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop": 4}, "stop"),
        ({"stream_options": {"nonsense": 1}}, "stream_options.nonsense"),
        ({"n": 2}, "does not have: n"),
        ({"tools": [{}], "logprobs": 1}, "does not have: logprobs, tools"),
    ],
)
def test_bad_parameters(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError, match=problem) as error:
        read_sampling({"prompt": "x", **fields})
    assert error.value.status == 400


def test_parameters_left_at_nothing_are_let_through() -> None:
    sampling = read_sampling({"prompt": "x", "n": 1, "tools": [], "logprobs": False, "seed": None})
    assert sampling.seed is None


def test_greedy_ignores_what_only_sampling_uses() -> None:
    asked = {"prompt": "x", "temperature": 0, "top_p": 0.5, "top_k": 3}
    assert read_sampling(asked).generation_kwargs() == {"do_sample": False}


def test_the_model_s_defaults_fill_gaps_only() -> None:
    sampling = read_sampling({"prompt": "x", "temperature": 0.5})
    filled = sampling.with_defaults({"temperature": 0.9, "top_p": 0.8})
    assert (filled.temperature, filled.top_p) == (0.5, 0.8)
    kwargs = filled.generation_kwargs()
    assert kwargs == {"do_sample": True, "temperature": 0.5, "top_p": 0.8, "top_k": 0}


def test_stop_may_be_one_string_and_the_new_name_of_max_tokens_counts() -> None:
    sampling = read_sampling({"messages": [], "stop": "end", "max_completion_tokens": 7})
    assert (sampling.stop, sampling.max_tokens) == (("end",), 7)
