"""The index of a sharded checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loader.errors import FormatError
from loader.weights.index import indexed_bytes, read_weight_map, shard_names, weight_map


def index(**tensors: object) -> bytes:
    return json.dumps({"metadata": {"total_size": 8}, "weight_map": tensors}).encode()


def test_names_and_map() -> None:
    text = index(a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors")
    assert weight_map(text, "i")["b"] == "model-00002-of-00002.safetensors"
    assert len(shard_names(text, "i")) == 2


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b"[]", b"{}", b'{"weight_map": []}', index(), index(a=1)]
)
def test_malformed(text: bytes) -> None:
    with pytest.raises(FormatError, match="malformed index") as error:
        shard_names(text, "i.json")
    assert error.value.where == "i.json"


@pytest.mark.parametrize(
    "name",
    [
        *("../a.safetensors", "/a.safetensors", "a/b.bin", "..", "", "a.py", ".a.bin", "a\\b.bin"),
        *("a.bin\n", "a\n.bin", "a\0.bin", "a" * 252 + ".bin", "é" * 126 + ".bin"),
    ],
)
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match="refused") as error:
        shard_names(index(a="good.safetensors", b=name, c="../bad.bin"), "i")
    assert len(error.value.problems) == len({name, "../bad.bin"})


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="malformed index"):
        read_weight_map(tmp_path / "i.json")


@pytest.mark.parametrize(
    "total", ["Infinity", "NaN", "-1", "1e999", "9" * 400, "[]", '"8"', "null", "{}"]
)
def test_sizes_that_are_none(total: str) -> None:
    assert indexed_bytes(f'{{"metadata": {{"total_size": {total}}}}}'.encode()) is None
    assert indexed_bytes(b'{"metadata": {"total_size": 8.0}}') == 8
