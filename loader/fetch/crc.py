"""CRC64NVME, the checksum that S3 itself stores: 25 GB/s, and pieces combine.

The functions are awscrt's, called in its shared library: importing the package would first gather
entropy and read the system's certificates for connections that nobody makes, 35 ms in all. Where
the library does not have them as they are known here, the package is imported after all.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

Data = bytes | memoryview

_SYMBOLS = {  # in awscrt's library, by their names in the package
    "crc64nvme": "aws_py_checksums_crc64nvme",
    "crc32": "aws_py_checksums_crc32",
    "crc32c": "aws_py_checksums_crc32c",
    "combine_crc64nvme": "aws_py_checksums_crc64nvme_combine",
    "combine_crc32": "aws_py_checksums_crc32_combine",
    "combine_crc32c": "aws_py_checksums_crc32c_combine",
}
_CHECKED = (b"123456789", 0xAE8B14860A799888)  # and its CRC64NVME, as all catalogues have it


def crc64nvme(data: Data, crc: int = 0) -> int:
    """Return the CRC of what *crc* is of, with *data* behind it."""
    return int(_functions()["crc64nvme"](data, crc))


def crc32(data: Data, crc: int = 0) -> int:
    """Return the CRC-32 in the same way."""
    return int(_functions()["crc32"](data, crc))


def crc32c(data: Data, crc: int = 0) -> int:
    """Return the CRC-32C in the same way."""
    return int(_functions()["crc32c"](data, crc))


def combine_crc64nvme(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC of two pieces, one behind the other, from theirs."""
    return int(_functions()["combine_crc64nvme"](first, second, second_bytes))


def combine_crc32(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32 of two pieces."""
    return int(_functions()["combine_crc32"](first, second, second_bytes))


def combine_crc32c(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32C of two pieces."""
    return int(_functions()["combine_crc32c"](first, second, second_bytes))


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    from importlib.util import find_spec

    spec = find_spec("_awscrt")
    found = _of_library(spec.origin) if spec is not None and spec.origin else None
    if found is None:
        from awscrt import checksums

        found = {name: getattr(checksums, name) for name in _SYMBOLS}
    return found


def _of_library(path: str) -> dict[str, Callable[..., Any]] | None:
    """Return the functions in the shared library at *path*, None where they are not as known.

    Each takes Python's own arguments, as a module's functions do, and lets go of the interpreter's
    lock where that is worth it: PyDLL leaves it alone.
    """
    import ctypes

    found: dict[str, Callable[..., Any]] = {}
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.PyDLL(path)
        for name, symbol in _SYMBOLS.items():
            function = library[symbol]
            function.restype, function.argtypes = ctypes.py_object, (ctypes.py_object,) * 2
            found[name] = _bound(function)
        data, crc = _CHECKED
        if found["crc64nvme"](data, 0) == crc:
            return found
    return None


def _bound(function: Callable[[None, tuple[Any, ...]], Any]) -> Callable[..., Any]:
    return lambda *arguments: function(None, arguments)
