"""The pattern rules of the platform's document."""

from __future__ import annotations

import pytest

from loader.resolve.patterns import compile_pathwise, match_pattern


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("rank-0/a.txt", "rank-0/a.txt", True),
        ("rank-0/a.txt", "rank-0/a.txt2", False),
        ("rank-*/checkpoint-10/", "rank-4/checkpoint-10/weights.safetensors", True),
        ("rank-*/checkpoint-10/", "rank-4/checkpoint-100/weights.safetensors", False),
        ("rank-*/checkpoint-10/", "rank-4/run/checkpoint-10/x", True),
        ("rank-0/checkpoint-10/", "rank-0/checkpoint-10", False),
        ("rank-?/x", "rank-1/x", True),
        ("rank-?/x", "rank-12/x", False),
        ("a?b", "a/b", True),
        ("*", "anything/at all+even this", True),
        ("", "", True),
        ("", "x", False),
        ("[0-9]*", "[0-9]x", True),
        ("[0-9]*", "5x", False),
        ("rank-0/*.json", "rank-0/a/b/c.json", True),
        ("**", "x", True),
        ("a*b*c", "axxbyybzzc", True),
        ("a*b*c", "axxbyybzz", False),
    ],
)
def test_match_pattern(pattern: str, name: str, expected: bool) -> None:
    assert match_pattern(pattern, name) is expected


def test_matching_is_linear_on_hostile_patterns() -> None:
    # An exponential matcher would not come back from this.
    assert not match_pattern("*a" * 200 + "b", "a" * 5000)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("rank-*/checkpoint-10/", "rank-4/checkpoint-10/sub/x", True),
        ("rank-*/checkpoint-10/", "rank-4/run/checkpoint-10/x", False),
        ("rank-0/*.json", "rank-0/b.json", True),
        ("rank-0/*.json", "rank-0/a/b.json", False),
    ],
)
def test_compile_pathwise(pattern: str, name: str, expected: bool) -> None:
    assert compile_pathwise(pattern)(name) is expected
