"""Quantised checkpoints: what their configs say, and what they are as plain weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from loader.errors import UnsupportedError
from loader.weights.header import TensorInfo, size_bytes
from loader.weights.inspect import read_json
from loader.weights.stored_forms import (
    LAYOUT,
    STATE,
    Packed,
    find_four_bits,
    find_mxfp4,
    find_scaled,
    find_words,
)

HF_QUANT_CONFIG = "hf_quant_config.json"  # ModelOpt's, beside config.json; vLLM reads it as well
_UNDONE = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "bitsandbytes", "mxfp4")
_KEYS = ("quantization_config", "compression_config")
# Of an FP8 cache for keys and values; vLLM has no place for them where nothing is quantised.
_OF_CACHE = re.compile(
    r"\.((k|v|q|kv|prob|prob_output)_(scale|zero_point)|q\.scale|[kv]_cache\.scale)$"
)
# What may remain as it is where every weight has been understood.
_PLAIN = ("F64", "F32", "F16", "BF16", "I64", "BOOL", "C64")
_LEFT_OVER = re.compile(
    r"(^|[._])(qweight|qzeros|g_idx|scales|blocks|SCB|absmax|quant_map|bitmask|compressed|"
    r"row_offsets|weight_(packed|scale|scale_inv|scale_2|global_scale|zero_point|shape|g_idx)|"
    r"proj_scale(_inv)?|(input|output|activation)_(scale|zero_point))$"
)
_FLOATS: Mapping[str, str] = MappingProxyType(
    {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
)


def read_model_config(folder: Path) -> Mapping[str, object]:
    """Return ``config.json`` of *folder*, with the quantisation that ModelOpt describes beside it.

    Raises:
        FormatError: one of them is no JSON object.
    """
    config = read_json(folder / "config.json")
    if quantisation_of(config) is None and (folder / HF_QUANT_CONFIG).is_file():
        about = read_json(folder / HF_QUANT_CONFIG)
        inner = about.get("quantization")
        fields = inner if isinstance(inner, dict) else about
        config["quantization_config"] = {"quant_method": "modelopt", **fields}
    return config


def quantisation_of(config: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return what ``config.json`` says of a quantisation; None where the weights are plain.

    Models of several parts may say it of one of them.
    """
    for key in _KEYS:
        if isinstance(found := config.get(key), dict):
            return found
    parts = (value for value in config.values() if isinstance(value, dict))
    return next((found for part in parts if (found := quantisation_of(part))), None)


def without_quantisation(config: Mapping[str, object]) -> dict[str, object]:
    """Return *config* without what any part of it says of a quantisation."""
    return {
        key: without_quantisation(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _KEYS
    }


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
    about = quantisation_of(config)
    if about is None:
        return {}
    found: dict[str, Packed] = {}
    for name, info in tensors.items():
        packed = (
            find_four_bits(name, tensors, read)
            or find_scaled(name, info, tensors, about, read)
            or find_mxfp4(name, info, tensors)
            or find_words(name, info, tensors, about)
        )
        if packed is not None:
            found[packed.name] = packed
    return MappingProxyType(found)


def is_description(name: str) -> bool:
    """Return whether *name* is a small tensor whose bytes ``find_packed`` reads."""
    return STATE in name or name.endswith(LAYOUT)


def check_dequantisable(
    where: str,
    config: Mapping[str, object],
    tensors: Mapping[str, TensorInfo],
    packed: Mapping[str, Packed] | None,
    *,
    asked_for: bool,
) -> None:
    """Check that the quantised base at *where* can be merged into, as what its weights stand for.

    ``tensors`` are those that are stored; ``packed`` is None where these are not known yet.

    Raises:
        UnsupportedError: that was not asked for, or weights are in a form that is not undone here.
    """
    about = quantisation_of(config) or {}
    method = _method(about)
    if not asked_for:
        raise UnsupportedError(
            "a quantised base cannot take up an adapter",
            where=where,
            got=method,
            expected="weights in bfloat16, float16 or float32",
            next_step="merge into the original model and quantise the result, attach instead, or "
            "set dequantise: true for a merged model in full precision",
        )
    strange = [
        f"{name}: {found.lacks}" if found.lacks else name
        for name, found in (packed or {}).items()
        if found.form == "packed" or found.lacks
    ]
    strange += _find_strange(tensors, packed) if packed is not None else []
    if about.get("transform_config"):
        strange.append("transform_config: rotations that the weights are to be used with")
    if strange or method not in _UNDONE:
        raise UnsupportedError(
            f"weights of the method {method!r} are not dequantised here",
            where=where,
            problems=strange,
            expected="FP8 and MXFP8 with the scales that the config describes, MXFP4 as of "
            "gpt-oss, or bitsandbytes",
            next_step="merge into the original model and quantise the result, or attach",
        )


def check_plain(where: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Check that *tensors*, of a model whose config names no quantisation, need none.

    Raises:
        UnsupportedError: weights in a dtype that means nothing without a scale, or their scales.
    """
    weights = {name for name in tensors if name.endswith(".weight")}
    strange = [
        f"{name}: {info.dtype}"
        for name, info in tensors.items()
        if info.dtype.startswith(("F8_", "F6_", "F4"))
        or (name in weights and info.dtype not in _PLAIN)
        or (
            name.endswith((".weight_scale", ".weight_scale_inv"))
            and name.removesuffix("_inv").removesuffix("_scale") in weights
        )
    ]
    if strange:
        raise UnsupportedError(
            "quantised weights of a model whose config.json names no quantisation",
            where=where,
            problems=strange,
            expected="quantization_config in config.json, or weights in full precision",
            next_step="take config.json from where the weights come from",
        )


def _find_strange(tensors: Mapping[str, TensorInfo], packed: Mapping[str, Packed]) -> list[str]:
    """Return what would remain when every weight is undone, and means nothing then."""
    left = plain_tensors(tensors, packed, "BF16")
    modules = {found.removesuffix(".weight") for found in packed if found.endswith(".weight")}
    return [
        f"{name}: {info.dtype}"
        for name, info in left.items()
        if name not in packed
        and (
            info.dtype not in _PLAIN
            or _LEFT_OVER.search(name)
            or (name.rpartition(".")[0] in modules and not name.endswith("bias"))
        )
    ]


def _method(about: Mapping[str, object]) -> str:
    named = "compressed-tensors" if "config_groups" in about else "quantization_config"
    return str(about.get("quant_method") or named)


def plain_tensors(
    tensors: Mapping[str, TensorInfo], packed: Mapping[str, Packed], dtype: str
) -> Mapping[str, TensorInfo]:
    """Return *tensors* with each quantised weight as it was, and nothing of its parts.

    The scales of a quantised cache go with them.
    """
    parts = {part: p for p in packed.values() for part in p.parts.values()}
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name not in parts:
            if not _OF_CACHE.search(name):
                found[name] = info
        elif parts[name].parts["weight"] == name:
            was = parts[name]
            found[was.name] = TensorInfo(
                was.name, dtype, was.shape, 0, size_bytes(dtype, was.shape)
            )
    return MappingProxyType(found)
