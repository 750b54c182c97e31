"""The arithmetic of edits: rows of the base in, rows of the merged tensor out.

Formulas and their order of operations are PEFT's (0.21, ``merge_and_unload`` on a CPU after
``PeftModel.from_pretrained``, which holds adapters in float32). ``exact="float32"`` computes all
edits of a tensor in float32 and rounds once, at the end; ``exact="peft"`` makes every rounding that
PEFT makes, and gives its bits. There, a fused product stands in for PEFT's three steps only where
it was seen to give the same bits for the same shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch

from loader.adapters.edits import (
    AddScaled,
    CombinedLowRank,
    Edit,
    ExpertLowRank,
    Factored,
    LowRank,
    Multiply,
    Part,
    Replace,
    ReplaceRows,
)
from loader.adapters.lowrank import find_kernel
from loader.weights.readers import Block

_SUSPICIOUS = 1e30

Exact = Literal["float32", "peft"]
Read = Callable[[str], torch.Tensor]


class Scratch:
    """Memory that one thread uses again and again: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}
        self._blocks: dict[str, dict[object, Block]] = {}
        # Whether the fused product gives the bits of PEFT's steps, by the shapes it was tried on.
        self.fused_is_same: dict[tuple[float, ...], bool] = {}
        # Whether the last fold saw only values that are finite in any dtype; None: it did not look.
        self.finite: bool | None = None

    def block(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Block:
        """Return a tensor in memory that is the same for the same *use*, whatever is there."""
        blocks = self._blocks.setdefault(use, {})
        if (shape, dtype) not in blocks:
            size = math.prod(shape) * dtype.itemsize
            memory = self._memory.get(use)
            if memory is None or len(memory) < size:
                blocks.clear()  # they hold the smaller memory
                memory = self._memory[use] = torch.empty(size, dtype=torch.uint8)
            blocks[shape, dtype] = Block.of(memory[:size].view(dtype).view(shape))
        return blocks[shape, dtype]

    def take(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the tensor of ``block``."""
        return self.block(use, shape, dtype).tensor


class Fold(Protocol):
    """One edit with its inputs in memory."""

    def __call__(self, rows: torch.Tensor, start: int, scratch: Scratch) -> torch.Tensor:
        """Return *rows*, [start, start + len(rows)) of the target, with the edit made.

        Both *rows* and *scratch* may be written over.
        """


def needs_whole(edit: Edit) -> bool:
    """Return whether the edit of a row depends on other rows."""
    if isinstance(edit, Part):
        return needs_whole(edit.edit)
    return isinstance(edit, Factored) or (
        isinstance(edit, LowRank) and edit.transposed and edit.magnitude is not None
    )


def make_fold(edit: Edit, read: Read, exact: Exact) -> Fold:
    """Return *edit* with its inputs read."""
    match edit:
        case LowRank():
            return _fold_dora(edit, read) if edit.magnitude else _fold_low_rank(edit, read, exact)
        case CombinedLowRank():
            return _fold_pair(*_combine(edit, read), 1.0, exact)
        case ExpertLowRank():
            return _fold_experts(edit, read, exact)
        case Replace():
            source = read(edit.source)
            return lambda rows, start, _: source[start : start + len(rows)].to(rows.dtype)
        case ReplaceRows():
            return _fold_rows(edit, read)
        case AddScaled():
            added = _wide(read(edit.source)) * edit.scaling
            return lambda rows, start, scratch: _add(
                rows, added[start : start + len(rows)], scratch
            )
        case Multiply():
            return _fold_factors(edit, read)
        case Factored():
            return _fold_product(edit, read)
        case Part():
            return _fold_part(edit, make_fold(edit.edit, read, exact))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return *tensor* in float32, as PEFT holds adapters; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def _add(rows: torch.Tensor, change: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return *rows* plus *change*, added in the wider dtype and rounded once."""
    if rows.dtype == change.dtype:
        return rows.add_(change)
    wide = scratch.take("wide", rows.shape, change.dtype)
    return _round(rows, wide.copy_(rows).add_(change), scratch)


def _round(rows: torch.Tensor, wide: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return *wide* in the memory of *rows*, rounded to their dtype; look at it on the way."""
    # float16 overflows by rounding what is finite here; bfloat16 has the range of float32.
    if rows.dtype == torch.bfloat16:
        scratch.finite = abs(float(wide.sum())) < _SUSPICIOUS
    return rows.copy_(wide.view(rows.shape))


def _factors(edit: LowRank, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (left, right) such that rows of the change are rows of left, times right."""
    a, b = _wide(read(edit.a)), _wide(read(edit.b))
    return (a.T.contiguous(), b.T.contiguous()) if edit.transposed else (b, a)


def _fold_low_rank(edit: LowRank, read: Read, exact: Exact) -> Fold:
    return _fold_pair(*_factors(edit, read), edit.scaling, exact, rounded=edit.rounded)


def _fold_pair(
    left: torch.Tensor,
    right: torch.Tensor,
    scaling: float,
    exact: Exact,
    *,
    rounded: bool = False,
) -> Fold:
    if left.ndim > 2 or right.ndim > 2:  # convolutions: A (rank, in, *kernel), B (out, rank, 1…)
        left, right = left.flatten(1), right.flatten(1)

    def fold(rows: torch.Tensor, start: int, scratch: Scratch) -> torch.Tensor:
        part = left[start : start + len(rows)]
        key = (*part.shape, *right.shape, scaling)
        if exact == "float32" or (not rounded and scratch.fused_is_same.get(key)):
            return _fuse(rows, part, right, scaling, scratch)
        change = scratch.take("change", (len(rows), right.shape[1]), left.dtype)
        torch.mm(part, right, out=change).mul_(scaling)
        change = change.view(rows.shape)
        if rounded:
            return _add(rows, change.to(rows.dtype), scratch)
        if key not in scratch.fused_is_same:
            # Over its own negative the last bits of a change show, which rounding hides elsewhere.
            base = change.neg().to(rows.dtype)
            fused = _fuse(base.clone(), part, right, scaling, scratch).clone()
            scratch.fused_is_same[key] = torch.equal(fused, _add(base, change, scratch))
        return _add(rows, change, scratch)

    return fold


def _fuse(
    rows: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float, scratch: Scratch
) -> torch.Tensor:
    """Return *rows* plus ``scaling · left @ right``, summed in float32 and rounded once."""
    kernel = find_kernel()
    if kernel is not None and kernel.takes(rows, left, right):
        merged = scratch.take("merged", tuple(rows.shape), rows.dtype)
        packed = scratch.take("packed", (kernel.packed_values(len(right)),), right.dtype)
        scratch.finite = kernel.add(merged, rows, left, right, scaling, packed)
        if scratch.finite:
            return merged
    wide = scratch.take("wide", (len(rows), right.shape[1]), left.dtype).copy_(rows.flatten(1))
    return _round(rows, wide.addmm_(left, right, alpha=scaling), scratch)


def _combine(edit: CombinedLowRank, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (left, right) of several adapters together.

    Source: peft ``tuners/lora/model.py``, ``add_weighted_adapter`` "linear" and "cat".
    """
    sides = []
    for names, factors, dim in ((edit.a, edit.scale_a, 0), (edit.b, edit.scale_b, 1)):
        tensors = [_wide(read(name)) for name in names]
        if edit.stacked:
            scaled = [t if f == 1 else t * f for t, f in zip(tensors, factors, strict=True)]
            sides.append(torch.cat(scaled, dim))
        else:
            stack = torch.stack(tensors)
            weights = torch.tensor(factors, dtype=stack.dtype)
            sides.append((stack * weights.view(-1, *[1] * tensors[0].ndim)).sum(dim=0))
    a, b = sides
    return (a.T.contiguous(), b.T.contiguous()) if edit.transposed else (b, a)


def _fold_dora(edit: LowRank, read: Read) -> Fold:
    """W' = m / ‖W + ΔW‖ · (W + ΔW), norms over the inputs of each output.

    Source: peft ``tuners/lora/variants.py``, ``DoraLinearVariant``, ``DoraEmbeddingVariant``,
    ``_DoraConvNdVariant``.
    """
    left, right = _factors(edit, read)
    if left.ndim > 2 or right.ndim > 2:  # convolutions
        left, right = left.flatten(1), right.flatten(1)
    magnitude = _wide(read(str(edit.magnitude))).flatten()

    def fold(rows: torch.Tensor, start: int, scratch: Scratch) -> torch.Tensor:
        part = left[start : start + len(rows)]
        change = torch.mm(part, right).mul_(edit.scaling).view(rows.shape)
        changed = change.add_(rows)
        if rows.ndim > 2:
            norms = changed.norm(p=2, dim=tuple(range(1, rows.ndim)), keepdim=True)
            factors = magnitude[start : start + len(rows)].view(norms.shape) / norms
            return changed.mul(factors).to(rows.dtype)
        by_output = changed.T if edit.transposed else changed
        norm: torch.Tensor = torch.linalg.norm(by_output, dim=1)
        if edit.transposed:
            return changed.mul((magnitude / norm).view(1, -1)).to(rows.dtype)
        factor = magnitude[start : start + len(rows)] / norm
        return changed.mul(factor.view(-1, 1)).to(rows.dtype)

    return fold


def _fold_experts(edit: ExpertLowRank, read: Read, exact: Exact) -> Fold:
    """ΔW[e] = B[:, :, e] A[e]; A as (experts, rank, in), B as (out, rank, experts).

    Source: peft ``tuners/lora/layer.py``, ``ParamWrapper.get_delta_weight``.
    """
    a, b = _wide(read(edit.a)), _wide(read(edit.b))
    a = a.reshape(edit.experts, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, edit.experts)

    def change_of(experts: slice) -> torch.Tensor:
        form = "o r e, e r i -> e i o" if edit.transposed else "o r e, e r i -> e o i"
        return torch.einsum(form, b[:, :, experts], a[experts]) * edit.scaling

    def fold(rows: torch.Tensor, start: int, scratch: Scratch) -> torch.Tensor:
        if edit.expert is None:
            change = change_of(slice(start, start + len(rows)))
        else:
            at = slice(edit.start + start, edit.start + start + len(rows))
            change = change_of(slice(edit.expert, edit.expert + 1))[0, at]
        # PEFT rounds the change of experts to the base's dtype before it adds it.
        return _add(rows, change.to(rows.dtype) if exact == "peft" else change, scratch)

    return fold


def _fold_rows(edit: ReplaceRows, read: Read) -> Fold:
    source = read(edit.source)
    places = sorted((row, at) for at, row in enumerate(edit.rows))

    def fold(rows: torch.Tensor, start: int, scratch: Scratch) -> torch.Tensor:
        for row, at in places:
            if start <= row < start + len(rows):
                rows[row - start] = source[at].to(rows.dtype)
        return rows

    return fold


def _fold_factors(edit: Multiply, read: Read) -> Fold:
    factors = _wide(read(edit.source)).flatten()

    def fold(rows: torch.Tensor, start: int, scratch: Scratch) -> torch.Tensor:
        if edit.columns:
            return (rows * factors).to(rows.dtype)
        part = factors[start : start + len(rows)]
        return (rows * part.view(-1, *[1] * (rows.ndim - 1))).to(rows.dtype)

    return fold


def _fold_part(edit: Part, inner: Fold) -> Fold:
    def fold(rows: torch.Tensor, start: int, scratch: Scratch) -> torch.Tensor:
        first, end = max(start, edit.start), min(start + len(rows), edit.end)
        if first >= end:
            return rows
        part = rows[first - start : end - start]
        part.copy_(inner(part.clone(), first - edit.start + edit.offset, scratch))
        scratch.finite = None
        return rows

    return fold


def _fold_product(edit: Factored, read: Read) -> Fold:
    parts = {part: _wide(read(name)) for part, name in edit.parts}

    def fold(rows: torch.Tensor, start: int, scratch: Scratch) -> torch.Tensor:
        match edit.method:
            case "LOHA":
                change = _loha(parts) * torch.tensor(edit.scaling)
            case "LOKR":
                change = _lokr(parts) * edit.scaling
            case _:
                change = _vera(parts, rows.shape[0 if edit.transposed else 1])
        change = change.T if edit.transposed else change
        return _add(rows, change.reshape(rows.shape), scratch)

    return fold


def _loha(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """(w1_a w1_b) ∘ (w2_a w2_b). Source: peft ``tuners/loha/layer.py``."""
    sides = []
    for i in "12":
        a, b, t = parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}")
        sides.append(a @ b if t is None else torch.einsum("i j ..., j r, i p -> p r ...", t, b, a))
    return sides[0] * sides[1]


def _lokr(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """w1 ⊗ w2, each whole or factored. Source: peft ``tuners/lokr/layer.py``."""
    first, second = _block(parts, "lokr_w1"), _block(parts, "lokr_w2")
    if second.ndim == 4:
        first = first.unsqueeze(2).unsqueeze(2)
    return torch.kron(first, second.contiguous())


def _block(parts: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name in parts:
        return parts[name]
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    if name == "lokr_w2" and "lokr_t2" in parts:
        return torch.einsum("i j ..., i p, j r -> p r ...", parts["lokr_t2"], a, b)
    return a @ b


def _vera(parts: dict[str, torch.Tensor], columns: int) -> torch.Tensor:
    """(λb B)(λd A), both sliced to the layer. Source: peft ``tuners/vera/layer.py``."""
    b, d = parts["vera_lambda_b"].unsqueeze(-1), parts["vera_lambda_d"].unsqueeze(-1)
    return (b * parts["vera_B"][: len(b)]) @ (d * parts["vera_A"][:, :columns])


def fold_all(
    folds: Sequence[Fold], rows: torch.Tensor, start: int, scratch: Scratch
) -> torch.Tensor:
    """Return *rows* with all *folds* made in order."""
    for fold in folds:
        scratch.finite = None
        rows = fold(rows, start, scratch)
    return rows.contiguous()
