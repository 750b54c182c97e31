"""The index of a sharded checkpoint: which file holds which tensor.

``model.safetensors.index.json`` and ``pytorch_model.bin.index.json`` are both
``{"metadata": {...}, "weight_map": {tensor: shard file}}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from loader.errors import FormatError
from loader.json_text import parse_json

MOST_SHARDS = 100_000  # that a file's name may speak of
_MOST_BYTES = 1 << 63
_NAME_BYTES = 255  # NAME_MAX of Linux
_SAFE = re.compile(r"[^/\\\0.\n][^/\\\0\n]*\.(safetensors|bin)")


def weight_map(text: bytes, where: str) -> Mapping[str, str]:
    """Return tensor name -> shard file name.

    Raises:
        FormatError: not such an index, or it names files outside its folder (all are listed).
    """
    try:
        index = parse_json(text.decode("utf-8"))
    except ValueError as error:
        raise _malformed(where, str(error)) from error
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise _malformed(where, "no weight_map of text to text")
    if not found:
        raise _malformed(where, "an empty weight_map")
    if unsafe := sorted({name for name in found.values() if not _is_safe(name)}):
        raise FormatError(
            "shard names that are refused",
            where=where,
            expected="plain names of .safetensors or .bin files beside the index",
            problems=[repr(name) for name in unsafe],
            next_step="save the checkpoint again with save_pretrained",
        )
    return MappingProxyType(found)


def _is_safe(name: str) -> bool:
    return bool(_SAFE.fullmatch(name)) and len(name.encode(errors="replace")) <= _NAME_BYTES


def shard_names(text: bytes, where: str) -> frozenset[str]:
    """Return the shard files that an index names.

    Raises:
        FormatError: as ``weight_map``.
    """
    return frozenset(weight_map(text, where).values())


def indexed_bytes(text: bytes) -> int | None:
    """Return the bytes of all tensors, where an index that is well formed says them."""
    metadata = parse_json(text).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return int(total) if isinstance(total, int | float) and 0 < total < _MOST_BYTES else None


def read_weight_map(path: Path) -> Mapping[str, str]:
    """Return tensor name -> shard file name of a local index.

    Raises:
        FormatError: as ``weight_map``, or the file cannot be read.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise _malformed(str(path), str(error)) from error
    return weight_map(text, str(path))


def _malformed(where: str, got: str) -> FormatError:
    return FormatError(
        "malformed index of a sharded checkpoint",
        where=where,
        expected='a JSON object with "weight_map"',
        got=got,
        next_step="fetch the index again, or save the checkpoint again",
    )
