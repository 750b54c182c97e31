"""The adapter that changes nothing, or all into NaN: found before anything is built upon it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from loader.adapters.config import AdapterConfig
from loader.adapters.problems import run_all
from loader.errors import AdapterError, FormatError
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
# The factors of a product, which is zero where one of them is.
_FACTOR = re.compile(
    r"(?P<module>.+)\.(lora_(embedding_)?[AB]|hada_[tw]\w+|lokr_[tw]\w+|vera_lambda_[bd])\b(?!\.bias)"
)
ReadRaw = Callable[[str], memoryview | bytes]
_Found = TypeVar("_Found")
_log = logging.getLogger("podloader")
_CHUNK = 1 << 20  # elements, whose mask stays in the cache


def check_read(
    fits: Callable[[], _Found],
    checks: Sequence[Callable[[Mapping[str, TensorInfo], ReadRaw], None]],
    config: AdapterConfig,
    tensors: Mapping[str, TensorInfo],
    read_raw: ReadRaw,
) -> _Found:
    """Return what *fits* does, once *checks* have read the tensors.

    Those of an adapter that does not fit its base may be of any size, and are not read.

    Raises:
        AdapterError: all that is wrong.
        FormatError: as *fits* does.
    """
    try:
        found = fits()
    except (AdapterError, FormatError) as error:
        run_all((partial(_raise, error), partial(check_effect, config, tensors, lambda _: b"\1")))
        raise
    run_all(partial(check, tensors, read_raw) for check in checks)
    return found


def _raise(error: Exception) -> None:
    raise error


def check_effect(
    config: AdapterConfig, tensors: Mapping[str, TensorInfo], read_raw: ReadRaw
) -> None:
    """Raise AdapterError naming tensors that are empty, or all where none has an effect.

    A LoRA's B starts as zeros: zeros there are a module that training never reached, such as a
    tower that only text went by. Some of them are told in the log. Whole tensors, biases and DoRA's
    magnitudes are values like any other.
    """
    empty = [f"{n}: empty {t.shape}" for n, t in tensors.items() if not t.size_bytes]
    products: dict[str, list[str]] = {}
    others = False
    for name in tensors if not empty else ():
        if match := _FACTOR.match(name):
            module = match["module"]
            zero = products.setdefault(module, [])
            if not config.scaling_of(module.removeprefix("base_model.model.")):
                zero[:] = [f"{module}: scaled by a lora_alpha of 0"]
            elif not bytes(read_raw(name)).strip(b"\0"):
                zero.append(f"{name}: all zero")
        else:
            others = others or not name.startswith("base_model.vera_")
    idle = [text for zero in products.values() for text in zero]
    working = others or not all(products.values())
    if empty or not working or not tensors:
        raise AdapterError(
            "an adapter that would change nothing",
            where=str(config.folder),
            problems=empty or idle or ["no tensors at all"],
            expected="trained values",
            next_step="save the adapter again, gathering sharded parameters first (ZeRO-3, FSDP)",
        )
    if idle:
        _log.warning(
            "%s: no effect of %d of its modules, such as %s", config.folder, len(idle), idle[0]
        )


def check_finite(folder: Path, tensors: Mapping[str, TensorInfo], read_raw: ReadRaw) -> None:
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
