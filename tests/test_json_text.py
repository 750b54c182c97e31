"""JSON that others wrote."""

from __future__ import annotations

import ast

import pytest

from loader.json_text import parse_json
from tests.house import LOADER


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "", "{", '{"a": 1}}', b"\xff\xfe", b"[\xc3]"],
)
def test_one_kind_of_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_objects_as_they_are_wanted() -> None:
    assert parse_json(b'{"a": {"b": 1}}', tuple) == (("a", (("b", 1),)),)


def test_nobody_reads_json_past_it() -> None:
    for path in LOADER.rglob("*.py"):
        if path.stem == "json_text":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("load", "loads"):
                assert not (isinstance(node.value, ast.Name) and node.value.id == "json"), path
