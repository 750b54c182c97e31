"""Quantised weights read as what they stand for, a few rows at a time."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType

import torch

from loader.weights.header import TensorInfo
from loader.weights.quantised import plain_tensors
from loader.weights.readers import TORCH_DTYPES, Block, SafetensorsReader, tensor_bytes
from loader.weights.stored_forms import Packed

_EXPONENT_BIAS = 127
_FP4_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)


class DequantisedReader:
    """A ``Reader`` over *stored*, a quantised checkpoint, in which every weight has *dtype*.

    ``derived`` are the tensors that are computed; the others are those of ``stored``. What can be
    undone is told by ``check_dequantisable``.
    """

    def __init__(self, stored: SafetensorsReader, packed: Mapping[str, Packed], dtype: str) -> None:
        self.plain = stored
        self.stored = {
            name: stored.stored[packed[name].parts["weight"] if name in packed else name]
            for name in plain_tensors(stored.tensors, packed, dtype)
        }
        self.tensors: Mapping[str, TensorInfo] = plain_tensors(stored.tensors, packed, dtype)
        self.derived = frozenset(packed)
        self._packed = MappingProxyType(dict(packed))
        self._dtype = TORCH_DTYPES[dtype]
        self._here = threading.local()

    def follow(self) -> Iterator[Collection[str]]:
        """Yield the names of tensors as all that they are computed from is there to be read.

        Raises:
            LoaderError: it does not come.
        """
        left = {name: set(packed.parts.values()) for name, packed in self._packed.items()}
        owners: dict[str, list[str]] = {}
        for name, parts in left.items():
            for part in parts:
                owners.setdefault(part, []).append(name)
        for names in self.plain.follow():
            ready = [n for n in names if n in self.tensors and n not in self.derived]
            for part in names:
                for owner in owners.get(part, ()):
                    left[owner].remove(part)
                    ready += [] if left[owner] else [owner]
            yield ready

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor."""
        if name not in self.derived:
            return self.plain.read(name)
        return self.read_rows(name, 0, self.tensors[name].shape[0])

    def read_rows(self, name: str, start: int, end: int, out: Block | None = None) -> torch.Tensor:
        """Return rows [start, end) of the first dimension."""
        if name not in self.derived:
            return self.plain.read_rows(name, start, end, out)
        packed = self._packed[name]
        unpack = {"four bits": self._unpack_four_bits, "mxfp4": self._unpack_mxfp4}
        return unpack.get(packed.form, self._scale)(packed, start, end).to(self._dtype)

    def read_raw(self, name: str) -> memoryview:
        """Return the tensor's bytes."""
        return tensor_bytes(self.read(name))

    def close(self) -> None:
        """Close all files."""
        self.plain.close()

    def _part(self, packed: Packed, role: str) -> torch.Tensor:
        """Return a part beside the weight itself; a thread keeps those of the weight it reads."""
        kept: tuple[str, dict[str, torch.Tensor]] = getattr(self._here, "kept", ("", {}))
        if kept[0] != packed.name:
            kept = self._here.kept = (packed.name, {})
        if role not in kept[1]:
            kept[1][role] = self.plain.read(packed.parts[role])
        return kept[1][role]

    def _scale(self, packed: Packed, start: int, end: int) -> torch.Tensor:
        """W = stored · scale, the scale being of all, of each row or of each block.

        Source: compressed_tensors ``quantization/lifecycle/forward.py``, ``_dequantize``, and
        ``compressors/mx_utils.py``; bitsandbytes ``functional.py``, ``int8_vectorwise_dequant``.
        """
        rows = self.plain.read_rows(packed.parts["weight"], start, end).to(torch.float32)
        scale = self._part(packed, "scale")
        if scale.dtype == torch.uint8:
            scale = torch.exp2(scale.to(torch.float32) - _EXPONENT_BIAS)
        scale = scale.to(torch.float32)
        if "SCB" in packed.parts:
            scale = scale / 127
        if "weight_zero_point" in packed.parts:
            points = self._part(packed, "weight_zero_point").to(torch.float32)
            rows -= _spread(points, packed, start, end)
        return rows * _spread(scale, packed, start, end)

    def _unpack_mxfp4(self, packed: Packed, start: int, end: int) -> torch.Tensor:
        """W = code[nibble] · 2^exponent of its block, transposed; the low nibble comes first.

        Source: transformers ``integrations/mxfp4.py``, ``convert_moe_packed_tensors``.
        """
        raw = self.plain.read_rows(packed.parts["weight"], start, end).to(torch.int64)
        exponents = self.plain.read_rows(packed.parts["scale"], start, end).to(torch.int32)
        code = torch.tensor(_FP4_VALUES)
        values = torch.stack((code[raw & 15], code[raw >> 4]), -1).flatten(-2)
        scaled = torch.ldexp(values, (exponents - _EXPONENT_BIAS).unsqueeze(-1))
        return scaled.flatten(-2).transpose(-1, -2).contiguous()

    def _unpack_four_bits(self, packed: Packed, start: int, end: int) -> torch.Tensor:
        """W = code[nibble] · absmax of its block; the first value is in the high nibble.

        Source: bitsandbytes ``functional.py``, ``dequantize_4bit``, and its CPU kernel.
        """
        state, parts = packed.state, packed.parts
        width = 1
        for size in packed.shape[1:]:
            width *= size
        size = int(str(state["blocksize"]))
        first, last = start * width // size, -(-end * width // size)
        weight = self.plain.tensors[parts["weight"]]
        in_bytes = weight.size_bytes // max(1, weight.shape[0])  # of one stored row
        low = first * size // 2 // in_bytes
        high = min(-(-last * size // 2 // in_bytes), weight.shape[0])
        stored = self.plain.read_rows(parts["weight"], low, high)
        raw = stored.flatten().view(torch.uint8).to(torch.int64)  # whatever bnb_4bit_quant_storage
        code = self._part(packed, "quant_map").to(torch.float32)
        values = torch.stack((code[raw >> 4], code[raw & 15]), 1).flatten()
        skipped = low * in_bytes * 2
        absmax = self._absmax(packed, first, last).repeat_interleave(size)
        offset = start * width
        count = (end - start) * width
        values = values[offset - skipped : offset - skipped + count]
        return (values * absmax[offset - first * size :][:count]).view(-1, *packed.shape[1:])

    def _absmax(self, packed: Packed, first: int, last: int) -> torch.Tensor:
        state, parts = packed.state, packed.parts
        found = self._part(packed, "absmax").flatten()[first:last]
        if "nested_absmax" not in parts:
            return found.to(torch.float32)
        code = self._part(packed, "nested_quant_map").to(torch.float32)
        outer = self._part(packed, "nested_absmax").to(torch.float32)
        block = torch.arange(first, last) // int(str(state["nested_blocksize"]))
        scaled = code[found.to(torch.int64)] * outer[block]
        return scaled + float(str(state["nested_offset"]))


def _spread(values: torch.Tensor, packed: Packed, start: int, end: int) -> torch.Tensor:
    """Return *values*, one for each block of the weight, for its rows [start, end)."""
    grid = [-(-size // block) for size, block in zip(packed.shape, packed.block, strict=True)]
    found = values.reshape(grid)[torch.arange(start, end) // packed.block[0]]
    for at, (size, block) in enumerate(zip(packed.shape, packed.block, strict=True)):
        if at and 1 < block < size:
            found = found.repeat_interleave(block, at).narrow(at, 0, size)
    return found
