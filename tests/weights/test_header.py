"""The safetensors header: read as the library reads it, one test per malformation."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loader.errors import FormatError
from loader.weights.header import Header, parse_header, read_header


def one(**changes: object) -> dict[str, object]:
    """Return the entry of a 2x2 float32 tensor at the beginning, changed as asked."""
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}


def parse(entries: object, *, data: int = 16, text: bytes | None = None) -> Header:
    """Parse a file made of *entries* and *data* bytes."""
    body = json.dumps(entries).encode() if text is None else text
    head = struct.pack("<Q", len(body)) + body
    return parse_header(head, len(head) + data, "x.safetensors")


def problems(entries: object, *, data: int = 16) -> str:
    with pytest.raises(FormatError) as error:
        parse(entries, data=data)
    assert error.value.where == "x.safetensors"
    assert error.value.next_step
    return "\n".join(error.value.problems)


def test_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a": torch.zeros(4, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5),
        "f8": torch.zeros(3, dtype=torch.float8_e4m3fn),
    }
    path = tmp_path / "t.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {n: t.shape for n, t in header.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    info = header.tensors["b"]
    assert (info.dtype, info.size_bytes) == ("BF16", 12)
    raw = path.read_bytes()[info.start : info.end]
    assert torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).tolist() == [0, 1, 2, 3, 4, 5]


def test_no_tensors_at_all() -> None:
    assert not parse({}, data=0).tensors


def test_sub_byte_elements() -> None:
    header = parse({"t": one(dtype="F4", shape=[2, 3], data_offsets=[0, 3])}, data=3)
    assert header.tensors["t"].size_bytes == 3
    entry = one(dtype="F6_E2M3", shape=[3], data_offsets=[0, 3])
    assert "whole bytes" in problems({"t": entry}, data=3)


@pytest.mark.parametrize("size", [0, 7])
def test_too_short(size: int) -> None:
    with pytest.raises(FormatError, match="too short"):
        parse_header(b"\0" * size, size, "x")


def test_length_over_the_limit() -> None:
    with pytest.raises(FormatError, match="absurd"):
        parse_header(struct.pack("<Q", 1 << 60) + b"{}", 1 << 62, "x")


@pytest.mark.parametrize("factors", [65, 240, 400_000])
def test_more_factors_than_a_tensor_has_dimensions(factors: int) -> None:
    found = problems({"t": one(shape=[3] * factors), "u": one(data_offsets=[3] * factors)})
    assert len(found) < 1000
    assert "list of counts, at most 64" in found
    assert (
        parse({"t": one(shape=[1] * 64, data_offsets=[0, 4])}, data=4).tensors["t"].size_bytes == 4
    )


def test_a_product_that_no_text_holds() -> None:
    assert "needs" in problems({"t": one(shape=[(1 << 63) - 1] * 64)})


def test_length_beyond_the_file() -> None:
    with pytest.raises(FormatError, match="truncated in the header"):
        parse_header(struct.pack("<Q", 100) + b"{}", 10, "x")


def test_head_shorter_than_the_header() -> None:
    with pytest.raises(FormatError, match="cut off"):
        parse_header(struct.pack("<Q", 100) + b"{}", 1000, "x")


@pytest.mark.parametrize("text", [b"\x80\x02}q\x00.", b"PK\x03\x04", b"[]", b" {}", b"", b"\0\0"])
def test_not_safetensors(text: bytes) -> None:
    with pytest.raises(FormatError, match="not a safetensors"):
        parse(None, text=text)


@pytest.mark.parametrize("text", [b'{"a":', b'{"a":1}x', b'{"\xff":1}', b'{"a":' * 50_000])
def test_not_json(text: bytes) -> None:
    with pytest.raises(FormatError, match="no JSON"):
        parse(None, text=text)


def test_padding_behind_the_json_is_fine() -> None:
    assert not parse(None, text=b"{}      ", data=0).tensors


def test_names_given_twice() -> None:
    entry = json.dumps(one())
    with pytest.raises(FormatError, match="twice") as error:
        parse(None, text=f'{{"t":{entry},"t":{entry}}}'.encode())
    assert "t" in error.value.got


def test_unknown_dtype() -> None:
    assert "unknown dtype 'F33'" in problems({"t": one(dtype="F33")})
    assert "unknown dtype" in problems({"t": one(dtype=["F32"])})


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, -2]},
        {"shape": [2.0, 2]},
        {"shape": [True, 4]},
        {"shape": 4},
        {"data_offsets": [0]},
        {"data_offsets": [0, 8, 16]},
        {"data_offsets": [-16, 0]},
        {"data_offsets": "0-16"},
    ],
)
def test_shapes_and_offsets_that_are_no_counts(change: dict[str, object]) -> None:
    assert "no list of counts" in problems({"t": one(**change)})


@pytest.mark.parametrize("entry", [[], "F32", {"dtype": "F32"}, {**one(), "more": 1}])
def test_entries_that_are_no_tensors(entry: object) -> None:
    assert "not an object" in problems({"t": entry})


@pytest.mark.parametrize("change", [{"shape": [2, 3]}, {"data_offsets": [16, 0]}, {"dtype": "F16"}])
def test_shape_and_bytes_disagree(change: dict[str, object]) -> None:
    assert "needs" in problems({"t": one(**change)})


def test_metadata_that_is_no_text() -> None:
    assert "__metadata__" in problems({"__metadata__": {"a": 1}, "t": one()})


def test_overlaps() -> None:
    entries = {"a": one(), "b": one(data_offsets=[8, 24])}
    assert "b: overlaps" in problems(entries, data=24)


def test_one_tensor_upon_another() -> None:
    assert "b: overlaps" in problems({"a": one(), "b": one()})


def test_holes() -> None:
    entries = {"a": one(), "b": one(data_offsets=[24, 40])}
    assert "b: leaves a hole" in problems(entries, data=40)
    assert "a: leaves a hole" in problems({"a": one(data_offsets=[8, 24])}, data=24)


def test_truncated_data() -> None:
    assert "truncated" in problems({"t": one()}, data=15)


def test_trailing_bytes() -> None:
    assert "1 bytes behind" in problems({"t": one()}, data=17)


def test_every_problem_at_once() -> None:
    entries = {"a": one(dtype="F33"), "b": one(shape=[3]), "c": one(shape="x")}
    assert len(problems(entries).splitlines()) == 3


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        read_header(tmp_path / "none")
