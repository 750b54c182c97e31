"""Patterns of an adapter's config: as PEFT matches them, and no longer than a moment."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft.utils.other import get_pattern_key

from loader.adapters import module_patterns as patterns
from loader.adapters.config import parse_adapter_config
from loader.adapters.module_patterns import _PLAIN, check_whole, matches_suffix, pattern_problem
from loader.errors import AdapterError

MODULES = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.1.mlp.experts.3.down_proj",
    "model.layers.1.mlp.experts",
    "lm_head",
    "a" * 40 + "!",
]
KEYS = [
    "q_proj",
    "self_attn.q_proj",
    "model.layers.0.self_attn.q_proj",
    r"model\.layers\.0\.self_attn\.q_proj",
    r"layers.\d+.self_attn.q_proj",
    r"^model.layers.1\d*.self_attn.q_proj",
    r".*proj",
    r".*\.(q|v)_proj",
    r"layers\.(0|10)\..*",
    r"(?:model|base)\.layers\.[01]\..*_proj$",
    r"(?<!down_)proj",
    r"experts.(\d)\.\w+|lm_head",
    "",
]
SLOW = ["(a+)+b", "(a|a)*b", "(a|aa)+b", r"(\w+\s?)*b", "a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*b"]


@pytest.mark.parametrize("key", KEYS)
def test_what_peft_says(key: str) -> None:
    for module in MODULES:
        assert matches_suffix(key, module) == (get_pattern_key([key], module) == key)


def test_random_patterns_match_as_peft_s() -> None:
    chance = random.Random(5)
    atoms = ["q_proj", "model", r"\.", ".", r"\d", r"\d+", "layers", "[01]", "(0|1)", "x?", "$"]
    for _ in range(300):
        key = "".join(chance.choices(atoms, k=chance.randint(1, 6)))
        module = ".".join(chance.choices(["model", "layers", "0", "17", "q_proj"], k=4))
        if pattern_problem(key) is None:
            expected = re.match(rf"(.*\.)?({key})$", module) is not None
            assert matches_suffix(key, module) == expected, (key, module)


@pytest.mark.parametrize("key", [r"layers\.\d+\.q_proj", "q_proj", r"model.layers.3.mlp.up_proj"])
def test_what_is_usual_needs_no_process(key: str) -> None:
    assert _PLAIN.fullmatch(key)


@pytest.mark.parametrize("key", SLOW)
def test_what_would_never_end(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_LIMIT_S", 0.3)
    began = time.monotonic()
    module = "a" * 60
    with pytest.raises(AdapterError, match="takes too long"):
        matches_suffix(key, module)
    with pytest.raises(AdapterError, match="takes too long"):
        check_whole(key, [module])
    assert time.monotonic() - began < 30  # not the age of the universe
    assert matches_suffix(r"(q|v)_proj", "v_proj")  # by the next process


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules"])
def test_a_config_that_the_engine_would_hang_on(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "_LIMIT_S", 0.3)
    values: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 8}
    values[field] = "(a+)+b" if field == "target_modules" else {"(a+)+b": 4}
    config = parse_adapter_config(values, Path("x"))
    with pytest.raises(AdapterError, match="takes too long"):
        config.check_patterns(["q_proj", "a" * 60])


@pytest.mark.parametrize(
    "key",
    ["(", "a)", "*", "x(?i)", "[", "a{2,1}", "x" * 2001, "(" * 500 + ")" * 500, "a{99999999999}"],
)
def test_what_peft_s_pattern_cannot_be_made_of(key: str) -> None:
    assert pattern_problem(key)
    values = {"peft_type": "LORA", "r": 8, "rank_pattern": {key: 4}}
    with pytest.raises(AdapterError, match="PEFT refuses") as caught:
        parse_adapter_config(values, Path("x"))
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_alpha", 1e308),
        ("lora_alpha", 10**400),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", True),
        ("lora_alpha", "16"),
        ("r", 10**400),
        ("r", 1 << 40),
        ("r", True),
        ("rank_pattern", {"x": 10**400}),
        ("rank_pattern", {"x": True}),
        ("rank_pattern", {"x": [1]}),
        ("alpha_pattern", {"x": 10**400}),
        ("alpha_pattern", {"x": float("nan")}),
        ("alpha_pattern", {"x": "1"}),
        ("alpha_pattern", [1]),
    ],
)
def test_numbers_that_are_none(field: str, value: object) -> None:
    values = {"peft_type": "LORA", "r": 8, "lora_alpha": 8} | {field: value}
    with pytest.raises(AdapterError, match="PEFT refuses") as caught:
        parse_adapter_config(values, Path("x"))
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_as_many_as_are_worth_matching(field: str) -> None:
    pattern = {f"layers.{i}": 4 for i in range(10_000)}
    values = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, field: pattern}
    config = parse_adapter_config(values, Path("x"))
    modules = [f"model.layers.{i}" for i in range(200)]
    assert [config.rank_of(m) * config.alpha_of(m) for m in modules] == [32.0] * 200
    pattern["one more"] = 4
    with pytest.raises(AdapterError, match="PEFT refuses"):
        parse_adapter_config(values, Path("x"))


@pytest.fixture
def matcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One that has matched nothing yet."""
    made = patterns._Matcher()
    monkeypatch.setattr(patterns, "_matcher", made)
    yield
    made.close()


@pytest.mark.usefixtures("matcher")
def test_a_matcher_that_has_done_much_is_followed_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ends by its limit of processor time, in the middle of a pattern that is right."""
    monkeypatch.setattr(patterns, "_LIMIT_CPU_S", 1)
    monkeypatch.setattr(patterns, "_LIMIT_S", 20.0)
    slow, module = "(a+)+b|(x|a)*", "a" * 21  # a while, and then a match
    for turn in range(9):
        assert matches_suffix(f"{slow}|{turn}", module), turn


@pytest.mark.usefixtures("matcher")
def test_one_that_ends_each_time_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_MATCHER", "import sys; sys.stdin.readline()")
    with pytest.raises(AdapterError, match="takes too long"):
        matches_suffix("(q|v)_projection", "v_projection")


@pytest.mark.usefixtures("matcher")
def test_many_slow_patterns_are_not_all_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_LIMIT_ALL_S", 0.5)
    monkeypatch.setattr(patterns, "_SLOW_S", 0.0)
    config = parse_adapter_config(
        {"peft_type": "LORA", "rank_pattern": {f"(a+)+b|(x|a)*|{n}": 4 for n in range(2000)}},
        Path("x"),
    )
    with pytest.raises(AdapterError, match="takes too long"):
        config.check_patterns(["a" * 19])
