"""How each method stores a quantised weight: which tensors stand for it, told from headers.

::

    fp8, fbgemm_fp8     X.weight F8, X.weight_scale_inv or X.weight_scale; of experts in one tensor
                        X F8, X_scale_inv or X_scale
    compressed-tensors  X.weight F8 or I8, X.weight_scale
                        X.weight_packed: several values in one
    modelopt            X.weight F8, X.weight_scale
    bitsandbytes        X.weight, two values in a byte, X.weight.absmax, X.weight.quant_map,
                        X.weight.nested_…, X.weight.quant_state.bitsandbytes__<nf4 or fp4>: JSON
                        X.weight I8, X.SCB: 127 times one factor per row
    mxfp4               X_blocks U8, two values in a byte, X_scales: the exponents of 32 each; X is
                        its transpose
    gptq, awq           X.qweight I32: several integers in one

A scale is one factor for all, or for each block of the sizes that the config names: rows, runs of a
row, or boxes. Factors are floating; where the format says so, bytes that are exponents of 2.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from loader.errors import FormatError
from loader.json_text import parse_json
from loader.weights.header import MAX_DIMENSIONS, TensorInfo, size_bytes

Form = Literal["scaled", "four bits", "mxfp4", "packed"]
STATE = ".quant_state.bitsandbytes__"
LAYOUT = ".weight_format"
_ABOUT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_SCALED = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8")
_SCALES = ("_scale_inv", "_scale")
_SIDE = ("weight_zero_point", "weight_g_idx", "weight_shape", "weight_format", "SCB",
         "input_scale", "input_zero_point", "input_scale_ub", "output_scale",
         "activation_scale")  # fmt: skip
_STACKED_SIDE = ("_scale_ub", "_input_scale", "_activation_scale")
_PACKED_SIDE = ("scales", "qzeros", "g_idx", "weight_scale", "weight_scale_2", "weight_shape",
                "weight_zero_point", "weight_g_idx", "weight_global_scale", "input_scale",
                "input_global_scale")  # fmt: skip
_FLOAT_SCALES = ("F32", "F16", "BF16", "F64", "F8_E8M0")
_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Packed:
    """One weight as it was, and what is stored in its place.

    ``parts`` are the stored tensors by role; ``state`` is what a JSON among them says. ``block``:
    one factor is of a box of these sizes. The form "packed" is known by its shape alone; ``lacks``
    says why a weight cannot be undone though its form could.
    """

    name: str
    shape: tuple[int, ...]
    form: Form
    parts: Mapping[str, str]
    block: tuple[int, ...] = ()
    state: Mapping[str, object] = field(default_factory=dict)
    lacks: str = ""


def _present(
    module: str, leaves: tuple[str, ...], tensors: Mapping[str, TensorInfo]
) -> dict[str, str]:
    return {leaf: f"{module}.{leaf}" for leaf in leaves if f"{module}.{leaf}" in tensors}


_BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


def find_four_bits(
    name: str, tensors: Mapping[str, TensorInfo], read: Callable[[str], bytes | memoryview]
) -> Packed | None:
    weight, mark, _ = name.partition(STATE)
    if not mark or weight not in tensors:
        return None
    try:
        state = parse_json(bytes(read(name)))
        shape = tuple(state["shape"])
        sizes = [state["blocksize"], state.get("nested_blocksize", 1), *shape]
        if len(shape) > MAX_DIMENSIONS or not all(
            type(s) is int and 0 < s < 1 << 40 for s in sizes
        ):
            raise ValueError(f"sizes {reprlib.repr(sizes)}")
        if not math.isfinite(state.get("nested_offset", 0.0)):
            raise ValueError("an offset that is no number")
        size = size_bytes("U8", shape)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise FormatError("a quant_state that is not bitsandbytes'", where=name) from error
    parts = {"weight": weight, "state": name, **_present(weight, _ABOUT, tensors)}
    if tensors[weight].size_bytes * 2 < size:
        raise FormatError("a quant_state of another weight", where=name, got=str(shape))
    return Packed(weight, shape, "four bits", parts, state=state)


def find_scaled(
    name: str,
    info: TensorInfo,
    tensors: Mapping[str, TensorInfo],
    about: Mapping[str, object],
    read: Callable[[str], bytes | memoryview],
) -> Packed | None:
    if info.dtype not in _SCALED or name.endswith(_SCALES) or f"{name}.absmax" in tensors:
        return None
    module, _, leaf = name.rpartition(".")
    parts = {"weight": name}
    if leaf == "weight":
        parts |= _present(module, _SIDE, tensors)
    parts |= {end: f"{name}{end}" for end in _STACKED_SIDE if f"{name}{end}" in tensors}
    scales = [f"{name}{end}" for end in _SCALES if f"{name}{end}" in tensors]
    if "SCB" in parts:
        scales.append(parts["SCB"])
    if not scales:
        return Packed(name, info.shape, "scaled", parts, lacks=f"{info.dtype} without a scale")
    parts["scale"] = scales[0]
    parts |= {f"scale {n}": other for n, other in enumerate(scales[1:])}
    scale = tensors[scales[0]]
    lacks = "several scales" if len(scales) > 1 else ""
    if "weight_format" in parts and any(bytes(read(parts["weight_format"]))):
        lacks = "its rows were tiled for a GPU (weight_format)"
    if "weight_g_idx" in parts:
        lacks = "its columns were reordered (weight_g_idx)"
    blocks = {
        block
        for asked in _readings(about, info.dtype)
        if (block := _fit(info.shape, scale, asked)) is not None
    }
    if len(blocks) != 1:
        lacks = lacks or (
            f"{scale.dtype} scales {list(scale.shape)} of {list(info.shape)}, which the config "
            "does not describe"
        )
    points = tensors.get(parts.get("weight_zero_point", ""))
    if points is not None and points.shape != scale.shape:
        lacks = lacks or f"zero points {list(points.shape)} beside scales {list(scale.shape)}"
    block = next(iter(blocks), ())
    return Packed(name, info.shape, "scaled", parts, block, lacks=lacks)


@dataclass(frozen=True, slots=True)
class _Reading:
    """What a config says of scales: the block that each is of, and whether bytes are exponents."""

    block: tuple[int, int] | None = None
    exponents: bool = False


def _readings(about: Mapping[str, object], dtype: str) -> list[_Reading]:
    """Return what *about* allows for weights of *dtype*; compressed-tensors may have groups."""
    groups = about.get("config_groups")
    if not isinstance(groups, dict):
        block = _pair(about.get("weight_block_size"))
        is_mx = str(about.get("quant_algo", "")).upper() == "MXFP8"
        return [_Reading((1, 32), exponents=True) if is_mx else _Reading(block)]
    kind = "int" if dtype == "I8" else "float"
    found = []
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or weights.get("type", "int") != kind:
            continue
        size = weights.get("group_size")
        block = _pair(weights.get("block_structure"))
        if type(size) is int and size > 0:
            block = (1, size)
        form = str(group.get("format") or about.get("format"))
        as_bytes = "uint8" in str(weights.get("scale_dtype")) or form == "mxfp8-quantized"
        found.append(_Reading(block, as_bytes))
    return found


def _fit(shape: tuple[int, ...], scale: TensorInfo, reading: _Reading) -> tuple[int, ...] | None:
    """Return the sizes of the box that each factor is of, None where *reading* is of others."""
    if scale.dtype != "U8" if reading.exponents else scale.dtype not in _FLOAT_SCALES:
        return None
    sizes = scale.shape
    if reading.block is not None and len(shape) > 1:
        block = (*(1 for _ in shape[2:]), *reading.block)
        counts = tuple(-(-size // b) for size, b in zip(shape, block, strict=True))
        return block if sizes == counts else None
    if math.prod(sizes) == 1:
        return shape
    sizes = sizes if len(sizes) == len(shape) else (*sizes, *(1 for _ in shape[len(sizes) :]))
    pairs = list(zip(shape, sizes, strict=True)) if len(sizes) == len(shape) else []
    if not pairs or any(count not in (1, size) for size, count in pairs):
        return None
    return tuple(size if count == 1 else 1 for size, count in pairs)


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int for v in value):
        return (value[0], value[1]) if min(value) > 0 else None
    return None


def find_mxfp4(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> Packed | None:
    """Source: transformers ``integrations/mxfp4.py``, ``convert_moe_packed_tensors``."""
    stem = name.removesuffix("_blocks")
    scales = tensors.get(f"{stem}_scales")
    if stem == name or scales is None or info.dtype != "U8" or len(info.shape) < 3:
        return None
    *above, rows, groups, width = info.shape
    lacks = ""
    if scales.dtype != "U8" or scales.shape != info.shape[:-1] or len(above) != 1:
        lacks = f"{scales.dtype} scales {list(scales.shape)} of blocks {list(info.shape)}"
    parts = {"weight": name, "scale": scales.name}
    return Packed(stem, (*above, groups * width * 2, rows), "mxfp4", parts, lacks=lacks)


def find_words(
    name: str,
    info: TensorInfo,
    tensors: Mapping[str, TensorInfo],
    about: Mapping[str, object],
) -> Packed | None:
    module, _, leaf = name.rpartition(".")
    in_bytes = info.dtype == "U8" and f"{module}.weight_scale" in tensors
    is_packed = leaf in ("qweight", "weight_packed") and info.dtype in ("I32", "U8")
    if (not is_packed and not (leaf == "weight" and in_bytes)) or len(info.shape) != 2:
        return None
    rows, columns = info.shape
    many = 2 if info.dtype == "U8" else _WORD_BITS // max(1, _bits_of(about))
    match leaf, about.get("quant_method"):
        case "qweight", "awq":
            shape = (columns * many, rows)
        case "qweight", _:
            shape = (columns, rows * many)
        case _:
            shape = (rows, columns * many)
    parts = {"weight": name, **_present(module, _PACKED_SIDE, tensors)}
    return Packed(f"{module}.weight", shape, "packed", parts)


def _bits_of(about: Mapping[str, object]) -> int:
    for key in ("bits", "w_bit", "num_bits"):
        if type(bits := about.get(key)) is int:
            return bits
    groups = about.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and type(bits := weights.get("num_bits")) is int:
            return bits
    return 4
