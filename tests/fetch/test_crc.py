"""CRCs come from awscrt's shared library without importing the package, and are the package's."""

from __future__ import annotations

import _ctypes
import random
import subprocess
import sys

import pytest
from awscrt import checksums

from loader.fetch import crc

_NAMES = ("crc64nvme", "crc32", "crc32c")


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("count", [0, 1, 9, 4096, 70_001])
def test_a_crc_is_the_packages_and_goes_on(name: str, count: int) -> None:
    data = random.Random(count).randbytes(count)
    half = count // 2
    ours, theirs = getattr(crc, name), getattr(checksums, name)
    assert ours(data) == theirs(data)
    assert ours(memoryview(data)[half:], ours(data[:half])) == theirs(data)
    combine = getattr(crc, f"combine_{name}")
    assert combine(ours(data[:half]), ours(data[half:]), count - half) == theirs(data)


def test_the_package_is_not_imported() -> None:
    code = (
        "import sys; from loader.fetch.crc import crc64nvme\n"
        "print(hex(crc64nvme(b'123456789')), '_awscrt' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.split() == ["0xae8b14860a799888", "False"]


@pytest.mark.parametrize("path", [_ctypes.__file__, "/nowhere/library.so", sys.executable])
def test_a_library_without_the_functions_is_left_alone(path: str) -> None:
    assert crc._of_library(path) is None


def test_what_is_no_bytes_is_refused() -> None:
    with pytest.raises(TypeError):
        crc.crc64nvme(None)  # type: ignore[arg-type]
