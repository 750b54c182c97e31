"""Quantised checkpoints: which tensor each stored group stands for, told without its weights.

::

    fp8                 X.weight F8, X.weight_scale_inv: one factor per block of weight_block_size
    compressed-tensors  X.weight F8 or I8, X.weight_scale: one factor, one per row, or per block
                        X.weight_packed I32: several integers in one
    bitsandbytes        X.weight U8, two values in a byte, X.weight.absmax, X.weight.quant_map,
                        X.weight.nested_…, X.weight.quant_state.bitsandbytes__<nf4 or fp4>: JSON
                        X.weight I8, X.SCB: 127 times one factor per row
    gptq, awq           X.qweight I32: several integers in one
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from loader.errors import FormatError, UnsupportedError
from loader.weights.header import TensorInfo, size_bytes

Form = Literal["scaled", "four bits", "packed"]
_STATE = ".quant_state.bitsandbytes__"
_ABOUT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_SCALED = ("F8_E4M3", "F8_E5M2", "I8")
_SCALES = ("weight_scale_inv", "weight_scale")
_SIDE = ("weight_zero_point", "input_scale", "activation_scale", "weight_format", "SCB")
_PACKED_SIDE = ("scales", "qzeros", "g_idx", "weight_scale", "weight_shape", "weight_zero_point",
                "weight_g_idx", "weight_global_scale", "input_global_scale")  # fmt: skip
_FLOATS: Mapping[str, str] = MappingProxyType(
    {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
)
_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Packed:
    """One weight as it was, and what is stored in its place.

    ``parts`` are the stored tensors by role; ``state`` is what a JSON among them says. The form
    "packed" is known by its shape alone.
    """

    name: str
    shape: tuple[int, ...]
    form: Form
    parts: Mapping[str, str]
    block: tuple[int, int] | None = None
    state: Mapping[str, object] = field(default_factory=dict)


def quantisation_of(config: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return what ``config.json`` says of a quantisation; None where the weights are plain."""
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    found = config.get("quantization_config", inner)
    return found if isinstance(found, dict) else None


def plain_dtype(config: Mapping[str, object]) -> str:
    """Return the dtype, as in "BF16", that the weights of a quantised model had."""
    text = config.get("text_config")
    for values in (config, text if isinstance(text, dict) else {}):
        named = values.get("dtype") or values.get("torch_dtype")
        if str(named) in _FLOATS:
            return _FLOATS[str(named)]
    return "BF16"


def find_packed(
    config: Mapping[str, object],
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], bytes | memoryview],
) -> Mapping[str, Packed]:
    """Return every quantised weight among *tensors* by the name that it had.

    ``read`` gives the bytes of a small tensor.

    Raises:
        FormatError: a description of a weight that cannot be read.
    """
    quantisation = quantisation_of(config)
    if quantisation is None:
        return {}
    found: dict[str, Packed] = {}
    for name, info in tensors.items():
        packed = (
            _find_four_bits(name, tensors, read)
            or _find_scaled(name, info, tensors, quantisation)
            or _find_words(name, info, tensors, quantisation)
        )
        if packed is not None:
            found[packed.name] = packed
    return MappingProxyType(found)


def is_description(name: str) -> bool:
    """Return whether *name* is a small tensor whose bytes ``find_packed`` reads."""
    return _STATE in name


def check_dequantisable(
    where: str,
    config: Mapping[str, object],
    packed: Mapping[str, Packed] | None,
    *,
    asked_for: bool,
) -> None:
    """Check that the quantised base at *where* can be merged into, as what its weights stand for.

    ``packed`` is None where these are not known yet.

    Raises:
        UnsupportedError: that was not asked for, or weights are in a form that is not undone here.
    """
    about = quantisation_of(config) or {}
    method = str(about.get("quant_method", "quantization_config in config.json"))
    if not asked_for or packed == {}:
        raise UnsupportedError(
            "a quantised base cannot take up an adapter",
            where=where,
            got=method,
            expected="weights in bfloat16, float16 or float32",
            next_step="merge into the original model and quantise the result, attach instead, or "
            "set dequantise: true for a merged model in full precision",
        )
    if strange := [name for name, found in (packed or {}).items() if found.form == "packed"]:
        raise UnsupportedError(
            f"weights of the method {method!r} are not dequantised here",
            where=where,
            problems=strange,
            expected="FP8, compressed-tensors with scales, or bitsandbytes",
            next_step="merge into the original model and quantise the result, or attach",
        )


def plain_tensors(
    tensors: Mapping[str, TensorInfo], packed: Mapping[str, Packed], dtype: str
) -> Mapping[str, TensorInfo]:
    """Return *tensors* with each quantised weight as it was, and nothing of its parts."""
    parts = {part: p for p in packed.values() for part in p.parts.values()}
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name not in parts:
            found[name] = info
        elif parts[name].parts["weight"] == name:
            was = parts[name]
            found[was.name] = TensorInfo(
                was.name, dtype, was.shape, 0, size_bytes(dtype, was.shape)
            )
    return MappingProxyType(found)


def _present(
    module: str, leaves: tuple[str, ...], tensors: Mapping[str, TensorInfo]
) -> dict[str, str]:
    return {leaf: f"{module}.{leaf}" for leaf in leaves if f"{module}.{leaf}" in tensors}


def _find_four_bits(
    name: str, tensors: Mapping[str, TensorInfo], read: Callable[[str], bytes | memoryview]
) -> Packed | None:
    weight, mark, _ = name.partition(_STATE)
    if not mark or weight not in tensors:
        return None
    try:
        state = json.loads(bytes(read(name)))
        shape = tuple(int(size) for size in state["shape"])
        float(state["blocksize"])
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError("a quant_state that is not bitsandbytes'", where=name) from error
    parts = {"weight": weight, "state": name, **_present(weight, _ABOUT, tensors)}
    if tensors[weight].size_bytes * 2 < math.prod(shape):
        raise FormatError("a quant_state of another weight", where=name, got=str(shape))
    return Packed(weight, shape, "four bits", parts, state=state)


def _find_scaled(
    name: str,
    info: TensorInfo,
    tensors: Mapping[str, TensorInfo],
    quantisation: Mapping[str, object],
) -> Packed | None:
    module, _, leaf = name.rpartition(".")
    if leaf != "weight" or info.dtype not in _SCALED:
        return None
    parts = {"weight": name, **_present(module, (*_SCALES, *_SIDE), tensors)}
    scale = next((leaf for leaf in (*_SCALES, "SCB") if leaf in parts), None)
    if scale is None:
        return None
    block = quantisation.get("weight_block_size")
    sizes = tensors[parts[scale]].shape
    given = (int(block[0]), int(block[1])) if isinstance(block, list) and len(block) == 2 else None
    if len(sizes) == len(info.shape) == 2 and sizes[1] > 1:
        given = given or (-(-info.shape[0] // sizes[0]), -(-info.shape[1] // sizes[1]))
    else:
        given = None
    return Packed(name, info.shape, "scaled", {**parts, "scale": parts[scale]}, given)


def _find_words(
    name: str,
    info: TensorInfo,
    tensors: Mapping[str, TensorInfo],
    quantisation: Mapping[str, object],
) -> Packed | None:
    module, _, leaf = name.rpartition(".")
    if leaf not in ("qweight", "weight_packed") or info.dtype != "I32" or len(info.shape) != 2:
        return None
    rows, columns = info.shape
    many = _WORD_BITS // max(1, _bits_of(quantisation))
    match leaf, quantisation.get("quant_method"):
        case "qweight", "awq":
            shape = (columns * many, rows)
        case "qweight", _:
            shape = (columns, rows * many)
        case _:
            shape = (rows, columns * many)
    parts = {"weight": name, **_present(module, _PACKED_SIDE, tensors)}
    return Packed(f"{module}.weight", shape, "packed", parts)


def _bits_of(quantisation: Mapping[str, object]) -> int:
    for key in ("bits", "w_bit", "num_bits"):
        if type(bits := quantisation.get(key)) is int:
            return bits
    groups = quantisation.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and type(bits := weights.get("num_bits")) is int:
            return bits
    return 4
