"""bfloat16 rows plus a low-rank product in one pass: ``lowrank.c``, where it was built and can run.

torch takes three passes: to float32, the product, back. The bits are those that PEFT's steps give:
the product is rounded to float32, scaled and rounded, added and rounded.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).with_name("_lowrank.so")  # one for every Python: see setup.py
_LEAST_ROWS = 6


class Kernel:
    """The function of *library* for vectors of *lanes* floats."""

    def __init__(self, library: ctypes.CDLL, lanes: int) -> None:
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self.library = library
        self.lanes = lanes
        self._add: Any = getattr(library, f"add_low_rank_{lanes}")
        self._add.argtypes = [pointer] * 2 + [size] * 2 + [pointer] * 2
        self._add.argtypes += [size, ctypes.c_float, pointer]

    def packed_values(self, rank: int) -> int:
        """Return how many float32 values it needs room for."""
        return 2 * self.lanes * rank

    def takes(self, rows: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> bool:
        """Return whether it can add ``left @ right`` to *rows*."""
        return (
            rows.dtype == torch.bfloat16
            and left.dtype == right.dtype == torch.float32
            and rows.is_contiguous()
            and left.is_contiguous()
            and right.is_contiguous()
            and len(left) >= _LEAST_ROWS
            and right.shape[1] >= 2 * self.lanes
        )

    def add(
        self,
        out: torch.Tensor,
        rows: torch.Tensor,
        left: torch.Tensor,
        right: torch.Tensor,
        scaling: float,
        packed: torch.Tensor,
    ) -> bool:
        """Put ``rows + scaling · left @ right`` into *out*; False where that is not all finite.

        rows, out: (n, m) in any shape, bfloat16; left: (n, rank) and right: (rank, m), float32.
        ``takes`` must have said yes. *out* is nothing to be used after a False.
        """
        count, rank = left.shape
        result: int = self._add(
            out.data_ptr(),
            rows.data_ptr(),
            count,
            right.shape[1],
            left.data_ptr(),
            right.data_ptr(),
            rank,
            scaling,
            packed.data_ptr(),
        )
        return result == 0


@functools.cache
def find_kernel() -> Kernel | None:
    """Return the kernel for this processor; None: not built, or for another processor."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    lanes = int(library.low_rank_lanes())
    return Kernel(library, lanes) if lanes else None
