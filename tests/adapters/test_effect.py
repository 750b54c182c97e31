"""What no adapter may hold, told from its bytes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from loader.adapters.effect import check_finite, is_finite
from loader.errors import AdapterError
from loader.weights.header import TensorInfo

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
}


def raw(values: torch.Tensor) -> bytes:
    return bytes(values.view(torch.uint8).numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_of_a_dtype_is_told_as_torch_tells_it(dtype: str) -> None:
    kind = DTYPES[dtype]
    bits = torch.arange(256 if kind.itemsize == 1 else 65536)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[kind.itemsize]
    values = (bits << 8 * max(kind.itemsize - 2, 0)).to(integers).view(kind)
    for value, finite in zip(values, values.double().isfinite(), strict=True):
        assert is_finite(raw(value.reshape(1)), dtype) == finite, value


def test_one_spoiled_value_among_many_is_found(tmp_path: Path) -> None:
    tensors = {"lora_A": torch.ones(2_000_000), "lora_B": torch.ones(3)}
    infos = {n: TensorInfo(n, "F32", tuple(t.shape), 0, t.nbytes) for n, t in tensors.items()}
    check_finite(tmp_path, infos, lambda name: raw(tensors[name]))
    for place in (0, 1_048_576, 1_999_999):
        tensors["lora_A"][place] = -math.inf
        with pytest.raises(AdapterError, match="NaN or infinite") as error:
            check_finite(tmp_path, infos, lambda name: raw(tensors[name]))
        assert error.value.problems == ("lora_A",)
        tensors["lora_A"][place] = 1


def test_bytes_without_a_float_are_finite() -> None:
    assert is_finite(b"\xff\xff", "I16")
