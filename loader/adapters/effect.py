"""The adapter that changes nothing, or all into NaN: found before anything is built upon it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from loader.errors import AdapterError
from loader.weights.header import TensorInfo

# The bits that are all set in NaN and infinity: IEEE 754's exponents, and E4M3's only NaN.
_EXPONENTS = {
    "F64": 0x7FF0_0000_0000_0000,
    "F32": 0x7F80_0000,
    "F16": 0x7C00,
    "BF16": 0x7F80,
    "F8_E5M2": 0x7C,
    "F8_E4M3": 0x7F,
}
_CHUNK = 1 << 20  # elements, whose mask stays in the cache


def check_effect(
    folder: Path, tensors: Mapping[str, TensorInfo], read_raw: Callable[[str], memoryview | bytes]
) -> None:
    """Raise AdapterError naming every adapter tensor that is empty, or all zero where it must not.

    A LoRA's B starts as zeros, so zeros there are a module that training never reached; zeros in
    biases and whole modules are values like any other.
    """
    problems = []
    for name, info in tensors.items():
        if not info.size_bytes:
            problems.append(f"{name}: empty {info.shape}")
        elif _must_differ(name) and not bytes(read_raw(name)).strip(b"\0"):
            problems.append(f"{name}: all zero")
    if not tensors:
        problems.append("no tensors at all")
    if problems:
        raise AdapterError(
            "an adapter that would change nothing",
            where=str(folder),
            problems=problems,
            expected="trained values in every tensor",
            next_step="save the adapter again, gathering sharded parameters first (ZeRO-3, FSDP)",
        )


def check_finite(
    folder: Path, tensors: Mapping[str, TensorInfo], read_raw: Callable[[str], memoryview | bytes]
) -> None:
    """Raise AdapterError naming every adapter tensor with values that are no numbers.

    An engine would mix them into the answers of others. A merge looks at what comes out of it.
    """
    spoiled = [n for n, info in tensors.items() if not is_finite(read_raw(n), info.dtype)]
    if spoiled:
        raise AdapterError(
            "NaN or infinite values in an adapter",
            where=str(folder),
            problems=spoiled,
            next_step="its training has diverged: choose an earlier checkpoint",
        )


def is_finite(raw: memoryview | bytes, dtype: str) -> bool:
    """Return whether no element is NaN or infinite; *dtype* as in "BF16", any that has neither."""
    if dtype not in _EXPONENTS:
        return True
    import numpy

    mask = _EXPONENTS[dtype]
    bits = numpy.frombuffer(raw, f"<u{(mask.bit_length() + 7) // 8}")
    chunks = (bits[at : at + _CHUNK] for at in range(0, len(bits), _CHUNK))
    return not any(((chunk & mask) == mask).any() for chunk in chunks)


def _must_differ(name: str) -> bool:
    return "lora_" in name or "hada_" in name or "lokr_" in name or "vera_lambda" in name
