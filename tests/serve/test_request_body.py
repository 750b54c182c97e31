"""Checks that hold for every engine."""

from __future__ import annotations

from typing import Any

import pytest

from loader.errors import RequestError
from loader.serve.request_body import PROMPTS, check_prompt, check_request


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ([], "not a JSON object"),
        ("text", "not a JSON object"),
        (None, "not a JSON object"),
        ({}, "either messages or prompt"),
        ({"model": "base", "prompt": None}, "either messages or prompt"),
        ({"messages": [], "prompt": ""}, "either messages or prompt"),
        ({"input": "x", "model": "base"}, "either messages or prompt"),
        ({"file": "x", "prompt": "x"}, "either messages or prompt"),
        ({"prompt": "x", "model": 3}, "not a name"),
        ({"prompt": "x", "model": ["base"]}, "not a name"),
    ],
)
def test_bad_bodies(body: Any, problem: str) -> None:
    with pytest.raises(RequestError, match=problem) as error:
        check_request(body, base="base", adapters=["a"])
    assert error.value.status == 400


def test_unknown_model_is_not_found_and_told_what_there_is() -> None:
    with pytest.raises(RequestError, match="'b' does not exist") as error:
        check_request({"prompt": "x", "model": "b"}, base="base", adapters=["a"])
    assert error.value.status == 404
    assert error.value.expected == "one of a, base"


@pytest.mark.parametrize(
    ("adapters", "chosen"), [([], "base"), (["a"], "a")], ids=["merged", "attached"]
)
def test_no_model_means_the_fine_tuned_one(adapters: list[str], chosen: str) -> None:
    assert check_request({"prompt": "x"}, base="base", adapters=adapters)["model"] == chosen


def test_no_model_among_several_is_refused() -> None:
    with pytest.raises(RequestError, match="names no model") as error:
        check_request({"prompt": "x"}, base="base", adapters=["a", "b"])
    assert error.value.expected == "one of a, b, base"


def test_the_path_decides_what_the_body_must_hold() -> None:
    body = {"prompt": "x", "model": "base"}
    assert check_prompt(body, ["prompt"]) == body
    with pytest.raises(RequestError, match="needs messages") as error:
        check_prompt(body, ["messages"])
    assert (error.value.expected, error.value.got) == ("messages (chat)", "prompt")


@pytest.mark.parametrize("kind", PROMPTS)
def test_an_engine_that_knows_every_sort(kind: str) -> None:
    body = {kind: "x"}
    assert check_request(body, base="base", adapters=[], known=PROMPTS)["model"] == "base"
    with pytest.raises(RequestError, match="or input or file") as error:
        check_request(body | {"file": "x", "input": "x"}, base="base", adapters=[], known=PROMPTS)
    assert "file" in error.value.got
