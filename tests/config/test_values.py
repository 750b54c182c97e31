"""Values of a config or a variable become what a setting is, or one line says what was expected."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta

from loader.config.values import Bytes, Words, read_value, show_value

COUNT = Annotated[int, Meta(ge=1, le=9)]
CHOICE = Literal["a", "b"] | None
LIMITED = Annotated[Bytes, Meta(ge=100)]


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("5", COUNT, 5),
        (5, float, 5.0),
        ("2.5", float, 2.5),
        (True, bool, True),
        ("no", bool, False),
        ("ON", bool, True),
        ("0", bool, False),
        ("/a b", Path | None, Path("/a b")),
        (None, Path | None, None),
        ("a", CHOICE, "a"),
        (None, CHOICE, None),
        ("x  y", Words, ("x", "y")),
        ('["x y"]', Words, ("x y",)),
        (["x"], Words, ("x",)),
        ({"a": {"b": 1}}, dict[str, dict[str, Any]], {"a": {"b": 1}}),
        ("16MiB", LIMITED, 16 << 20),
        ("1.5 kB", LIMITED, 1500),
        ("128", LIMITED, 128),
        (128, LIMITED, 128),
    ],
)
def test_what_is_taken(value: object, kind: Any, expected: object) -> None:
    found = read_value(value, kind)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        (0, COUNT, ">= 1"),
        ("10", COUNT, "<= 9"),
        (True, COUNT, "int"),
        ("S3CR3T", COUNT, "int"),
        ("S3CR3T", bool, "bool"),
        ("S3CR3T", CHOICE, "'a' or 'b'"),
        (5, Path, "path"),
        ([5], Words, "str"),
        ("[S3CR3T", Words, "JSON list"),
        ("S3CR3T", dict[str, Any], "object"),
        ("16 S3CR3T", LIMITED, "such as 16MiB"),
        ("9" * 5000, LIMITED, "such as 16MiB"),
        ("99B", LIMITED, ">= 100"),
    ],
)
def test_what_is_refused_without_showing_it(value: object, kind: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("[", r"\[")) as caught:
        read_value(value, kind)
    assert "S3CR3T" not in str(caught.value)


def test_values_are_shown_as_json() -> None:
    assert show_value(("a", 1, None, Path("/x"))) == '["a",1,null,"/x"]'
