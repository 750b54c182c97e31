"""The compiled low-rank product, compared in every bit with torch's three steps."""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loader.adapters import fold, lowrank
from loader.adapters.edits import LowRank
from loader.adapters.fold import Scratch, make_fold
from loader.adapters.lowrank import Kernel, find_kernel

ROOT = Path(__file__).parents[2]
FLAGS = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
NAN = 0x7FFF  # as bfloat16, with every bit of it set: rounded like a number, it would wrap to -0


@pytest.fixture(params=[16, 8])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    lanes: int = request.param
    found = find_kernel()
    if found is None or found.lanes < lanes:
        pytest.skip(f"no kernel of {lanes} lanes for this processor")
    return Kernel(found.library, lanes)


def draw(rows: int, columns: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(rows * columns + rank)
    base = torch.randn(rows, columns, generator=random).to(torch.bfloat16)
    left = torch.randn(rows, rank, generator=random)
    return base, left, torch.randn(rank, columns, generator=random)


def add(kernel: Kernel, base: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> object:
    """Return the sum, with a factor that is no power of two, or None."""
    out, packed = torch.empty_like(base), torch.empty(kernel.packed_values(len(right)))
    before = base.clone()
    assert kernel.takes(base, left, right)
    whole = kernel.add(out, base, left, right, 2 / 3, packed)
    assert torch.equal(base.view(torch.int16), before.view(torch.int16))
    return out if whole else None


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not {"avx2", "fma"} <= set(FLAGS),
    reason="a processor that the kernel was not written for",
)
def test_it_is_built_and_used_where_it_can_run() -> None:
    found = find_kernel()
    assert found is not None
    assert found.lanes == (16 if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= {*FLAGS} else 8)


@pytest.mark.parametrize("columns", [32, 33, 63, 64, 2048])
@pytest.mark.parametrize("rows", [6, 7, 11, 12, 64])
@pytest.mark.parametrize("rank", [1, 7, 16, 64])
def test_same_bits_as_step_by_step(kernel: Kernel, rows: int, columns: int, rank: int) -> None:
    base, left, right = draw(rows, columns, rank)
    # Summed in the order of the rank, as torch sums a product of this many rows by many columns.
    change = torch.zeros(rows, columns, dtype=torch.float64)
    for k in range(rank):
        change = (change + left[:, k : k + 1].double() * right[k].double()).float().double()
    expected = (base.float() + change.float() * torch.tensor(2 / 3)).to(torch.bfloat16)
    found = add(kernel, base, left, right)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("place", [(0, 0), (63, 2047), (40, 1001)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_says_what_is_not_finite(kernel: Kernel, place: tuple[int, int], value: float) -> None:
    base, left, right = draw(64, 2048, 8)
    base[place] = value
    assert add(kernel, base, left, right) is None
    base.view(torch.int16)[place] = NAN
    assert add(kernel, base, left, right) is None


def test_says_what_is_not_finite_once_it_is_rounded(kernel: Kernel) -> None:
    base, left, right = draw(64, 2048, 1)
    base[5, 70] = torch.finfo(torch.bfloat16).max
    left[5], right[0, 70] = 1.0, 1.5e36
    assert (base.float() + left @ right * 2 / 3).isfinite().all()
    assert add(kernel, base, left, right) is None
    right[0, 70] = 1.0
    assert isinstance(add(kernel, base, left, right), torch.Tensor)


def test_takes_no_other_tensors(kernel: Kernel) -> None:
    base, left, right = draw(64, 2048, 8)
    assert kernel.takes(base, left, right)
    assert not kernel.takes(base.to(torch.float16), left, right)
    assert not kernel.takes(base, left.double(), right.double())
    assert not kernel.takes(base.T, left, right)
    assert not kernel.takes(base, left, right.T.contiguous().T)
    assert not kernel.takes(base[:5], left[:5], right)
    assert not kernel.takes(base[:, :15].contiguous(), left, right[:, :15].contiguous())


@pytest.mark.parametrize("transposed", [False, True])
def test_a_merge_by_either_rounding_has_the_bits_of_steps(
    monkeypatch: pytest.MonkeyPatch, transposed: bool
) -> None:
    base, left, right = draw(128, 512, 16)
    inputs = {"a": left.T.contiguous(), "b": right.T.contiguous()} if transposed else {}
    inputs = inputs or {"a": right, "b": left}
    edit = LowRank("w", "a", "b", 2 / 3, transposed)

    def merge(exact: fold.Exact) -> torch.Tensor:
        change = make_fold(edit, inputs.__getitem__, exact)
        scratch = Scratch()
        first = change(base.clone(), 0, scratch).clone()
        again = change(base.clone(), 0, scratch).clone()  # where it was seen that they are the same
        assert torch.equal(first, again)
        return again

    by_default, exactly = merge("float32"), merge("peft")
    monkeypatch.setattr(fold, "find_kernel", lambda: None)
    assert torch.equal(exactly, merge("peft"))
    assert find_kernel() is None or torch.equal(by_default, exactly)


def test_a_merge_names_what_is_not_finite_by_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    base, left, right = draw(64, 2048, 8)
    base.view(torch.int16)[3, 3] = NAN
    change = make_fold(LowRank("w", "a", "b", 1.0), {"a": right, "b": left}.__getitem__, "float32")
    for _ in range(2):
        scratch = Scratch()
        merged = change(base.clone(), 0, scratch)
        assert not scratch.finite
        assert merged[3, 3].isnan()
        monkeypatch.setattr(fold, "find_kernel", lambda: None)


def test_it_is_no_must(tmp_path: Path) -> None:
    """Where no compiler was at hand, the package is there without it."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    shutil.copy(lowrank.__file__, folder)
    code = "import lowrank; print(lowrank.find_kernel())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
