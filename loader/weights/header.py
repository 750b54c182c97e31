"""The header of a safetensors file, checked before anything is allocated by its word.

::

    <8 bytes: n, unsigned little-endian><n bytes: JSON object><tensor bytes, no holes>

Source of the format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import reprlib
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from loader.errors import FormatError
from loader.json_text import parse_json

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64  # of what torch computes with; a product of many more is work without end
METADATA_KEY = "__metadata__"

# Bits of one element; the codes are those of safetensors 0.8.
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("F4",), 4),
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
        **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
        **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
        **dict.fromkeys(("I32", "U32", "F32"), 32),
        **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    }
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: bytes [start, end) of its file, ``dtype`` as in "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """The bytes it takes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """All tensors of a file by name, in the order of their bytes; offsets are the file's."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int


def size_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor.

    Raises:
        ValueError: an unknown dtype, or sub-byte elements that do not fill whole bytes.
    """
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{math.prod(shape)} elements of {dtype} do not fill whole bytes")
    return bits // 8


def header_length(head: bytes, file_bytes: int, where: str) -> int:
    """Return the length of the JSON part, from the first eight bytes of a file.

    Raises:
        FormatError: the file is too short for it, or the length is absurd.
    """
    if len(head) < 8 or file_bytes < 8:
        raise _broken("too short for a safetensors file", where, "8 bytes or more", file_bytes)
    length = int(struct.unpack("<Q", head[:8])[0])
    if length > MAX_HEADER_BYTES:
        raise _broken("absurd header length", where, f"at most {MAX_HEADER_BYTES}", length)
    if 8 + length > file_bytes:
        raise _broken("truncated in the header", where, f"{8 + length} bytes", file_bytes)
    return length


def parse_header(head: bytes, size_bytes: int, where: str) -> Header:
    """Return the header of a file of *size_bytes* whose first bytes are *head*.

    Raises:
        FormatError: any malformation; of wrong tensors all are listed.
    """
    length = header_length(head, size_bytes, where)
    if len(head) < 8 + length:
        raise _broken("header cut off", where, f"{8 + length} bytes", len(head))
    entries = _decode(head[8 : 8 + length], where)
    metadata = entries.pop(METADATA_KEY, {})
    problems: list[str] = []
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append(f"{METADATA_KEY}: not a map of text to text")
        metadata = {}
    found = [_read_entry(name, entry, 8 + length, problems) for name, entry in entries.items()]
    tensors = sorted((t for t in found if t), key=lambda t: (t.start, t.end))
    if not problems:
        problems += _cover_problems(tensors, 8 + length, size_bytes)
    if problems:
        raise FormatError(
            "safetensors header that lies about its tensors",
            where=where,
            problems=problems,
            next_step="fetch the file again; it is damaged or was cut short when it was saved",
        )
    by_name = MappingProxyType({t.name: t for t in tensors})
    return Header(by_name, MappingProxyType(metadata), 8 + length)


def read_header(path: Path) -> Header:
    """Return the header of a local file.

    Raises:
        FormatError: as ``parse_header``, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            total = file.seek(0, 2)
            file.seek(0)
            head = file.read(8)
            head += file.read(header_length(head, total, str(path)))
    except OSError as error:
        raise FormatError(
            "safetensors file that cannot be read", where=str(path), got=str(error)
        ) from error
    return parse_header(head, total, str(path))


def _decode(text: bytes, where: str) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = sorted(name for name, count in counts.items() if count > 1)
            raise _broken("names given twice in a safetensors header", where, "", twice)
        return found

    if not text.startswith(b"{"):
        raise _broken("not a safetensors file", where, "a header that opens with '{'", text[:16])
    try:
        entries = parse_json(text.decode("utf-8"), unique)
    except ValueError as error:
        raise _broken("safetensors header is no JSON", where, "a JSON object", error) from error
    return dict(entries)


def _read_entry(name: str, entry: object, base: int, problems: list[str]) -> TensorInfo | None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        problems.append(f"{name}: not an object of dtype, shape and data_offsets")
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        found = f"shape {reprlib.repr(shape)} or data_offsets {reprlib.repr(offsets)}"
        problems.append(f"{name}: {found} is no list of counts, at most {MAX_DIMENSIONS}")
        return None
    start, end = offsets
    try:
        needed = size_bytes(str(dtype), tuple(shape))
    except ValueError as error:
        problems.append(f"{name}: {error}")
        return None
    if end - start != needed:
        problems.append(f"{name}: {dtype} {shape} needs {needed} bytes, offsets give {end - start}")
        return None
    return TensorInfo(name, dtype, tuple(shape), base + start, base + end)


def _are_counts(value: object) -> bool:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return False
    return all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _cover_problems(tensors: list[TensorInfo], data_start: int, file_bytes: int) -> list[str]:
    problems = []
    at = data_start
    for t in tensors:
        if t.start != at:
            kind = "overlaps the tensor before it" if t.start < at else "leaves a hole before it"
            problems.append(f"{t.name}: {kind}: starts at {t.start}, expected {at}")
        at = max(at, t.end)
    if at > file_bytes:
        problems.append(f"truncated: the tensors end at {at}, the file at {file_bytes}")
    elif at < file_bytes:
        problems.append(f"{file_bytes - at} bytes behind the last tensor")
    return problems


def _broken(what: str, where: str, expected: str, got: object) -> FormatError:
    return FormatError(
        what,
        where=where,
        expected=expected,
        got=str(got),
        next_step="fetch the file again, or give the safetensors file that was meant",
    )
