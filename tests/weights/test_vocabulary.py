"""Tokens beyond a model's rows are told, whichever of the tokenizer's files speaks of them."""

from __future__ import annotations

from typing import Any

import pytest

from loader.weights.vocabulary import describe_ids

CONFIG = {"vocab_size": 10}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 10}}}),
        ("tokenizer.json", {"model": {"vocab": [[str(i), 0.0] for i in range(11)]}}),
        ("tokenizer.json", {"added_tokens": [{"id": 10, "content": "b"}], "model": {}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"10": {"content": "b"}}}),
        ("added_tokens.json", {"b": 10}),
        ("vocab.json", {"a": 9, "b": 10}),
    ],
)
def test_a_token_beyond_the_rows(name: str, content: dict[str, Any]) -> None:
    told = describe_ids({name: content}, CONFIG)
    assert told is not None
    assert "1 tokens" in told
    assert "10 rows" in told
    assert describe_ids({name: content}, {"text_config": {"vocab_size": 10}}) == told
    assert describe_ids({name: content}, {"vocab_size": 11}) is None


@pytest.mark.parametrize(
    "content", [{}, {"model": None}, {"model": {"vocab": 3}}, {"added_tokens": [3, {"id": "x"}]}]
)
def test_what_is_no_tokenizer_is_no_problem(content: dict[str, Any]) -> None:
    files = dict.fromkeys(("tokenizer.json", "tokenizer_config.json", "vocab.json"), content)
    assert describe_ids(files, CONFIG) is None
    assert describe_ids(files, {}) is None
    assert describe_ids(files, {"vocab_size": "ten"}) is None
