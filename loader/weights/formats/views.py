"""Tensors of a checkpoint under the names, and in the parts and orders, that a model has them in.

Trainers with model code of their own fuse, stack or reorder what transformers keeps apart. Each
tensor of the model is then rows of one of theirs: no bytes are moved to say so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from loader.errors import CheckpointError
from loader.weights.formats.pieces import Piece, SourceTensor
from loader.weights.header import size_bytes


class OpenableTensors(Protocol):
    """The part of a source that is looked at here; see ``consolidation.ShardedSource``."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    def open(self, names: Sequence[str], dtype: str | None) -> tuple[SourceTensor, ...]:
        """Return these tensors as pieces."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [start, end) of a tensor, every *step*-th."""

    start: int
    end: int
    step: int = 1

    @property
    def count(self) -> int:
        """How many they are."""
        return len(range(self.start, self.end, self.step))


@dataclass(frozen=True, slots=True)
class View:
    """Rows of *tensor*, one run behind the other; of one *layer* where layers are stacked."""

    tensor: str
    layer: int | None
    rows: tuple[Rows, ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """What config.json says of attention and vocabulary; ``size`` is a head's rows."""

    queries: int
    groups: int
    size: int
    vocabulary: int


def read_heads(config: Mapping[str, object], where: str) -> Heads:
    """Return the sizes that trainers fuse and reorder by.

    Raises:
        CheckpointError: config.json does not say.
    """
    text = config.get("text_config", config)
    fields = text if isinstance(text, dict) else config

    def number(name: str, otherwise: object = None) -> int:
        value = fields.get(name) or otherwise
        if type(value) is not int or value <= 0:
            raise CheckpointError(
                "a config.json that does not say how the trainer's tensors are laid out",
                where=where,
                expected=f"{name}, a number",
                got=repr(value),
                next_step="put the config.json of the Hugging Face model beside the checkpoint, "
                "or set base_model to it",
            )
        return value

    queries = number("num_attention_heads")
    size = number("head_dim", number("hidden_size") // queries)
    return Heads(queries, number("num_key_value_heads", queries), size, number("vocab_size"))


class ViewSource:
    """The tensors of a source, as *views* (model's name -> view) show them."""

    def __init__(self, source: OpenableTensors, views: Mapping[str, View]) -> None:
        self._source, self._views = source, views
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: _shape(view, source.shapes[view.tensor]) for name, view in views.items()
        }
        self.dtypes: Mapping[str, str] = {
            name: source.dtypes[view.tensor] for name, view in views.items()
        }

    def open(self, names: Sequence[str], dtype: str | None) -> tuple[SourceTensor, ...]:
        """Return the tensors of these names.

        Raises:
            CheckpointError: as the source, by the trainer's names.
        """
        wanted = list(dict.fromkeys(self._views[name].tensor for name in names))
        opened = dict(zip(wanted, self._source.open(wanted, dtype), strict=True))
        layers: dict[str, Mapping[int, Sequence[Piece]]] = {}
        made = []
        for name in names:
            view, shape = self._views[name], self.shapes[name]
            tensor = opened[view.tensor]
            pieces: Sequence[Piece] = tensor.pieces
            if view.layer is not None:
                if view.tensor not in layers:
                    layers[view.tensor] = _group_layers(tensor)
                pieces = layers[view.tensor].get(view.layer, ())
            cut = tuple(part for piece in pieces for part in _cut(piece, view.rows))
            made.append(SourceTensor(name, tensor.dtype, shape, shape, cut))
        return tuple(made)


def _shape(view: View, shape: tuple[int, ...]) -> tuple[int, ...]:
    rest = shape[1:] if view.layer is None else shape[2:]
    return (sum(rows.count for rows in view.rows), *rest)


def _group_layers(tensor: SourceTensor) -> dict[int, list[Piece]]:
    """Return the pieces of each layer of a stacked tensor, without the dimension of layers."""
    found: dict[int, list[Piece]] = {}
    for piece in tensor.pieces:
        stride = _row_stride(piece) * size_bytes(piece.dtype, (1,))
        strides = None if piece.strides is None else piece.strides[1:]
        for at in range(piece.sizes[0]):
            start = piece.start + at * stride
            inner = Piece(
                piece.file, start, piece.dtype, piece.offsets[1:], piece.sizes[1:], strides
            )
            found.setdefault(piece.offsets[0] + at, []).append(inner)
    return found


def _cut(piece: Piece, runs: Sequence[Rows]) -> Iterator[Piece]:
    """Give the parts of *piece* that lie in *runs* of rows, at their places behind each other."""
    stride = _row_stride(piece)
    first, last = piece.offsets[0], piece.offsets[0] + piece.sizes[0]
    at = 0
    for rows in runs:
        skipped = max(0, -(-(first - rows.start) // rows.step))
        low, high = rows.start + skipped * rows.step, min(rows.end, last)
        if low < high:
            yield Piece(
                piece.file,
                piece.start + (low - first) * stride * size_bytes(piece.dtype, (1,)),
                piece.dtype,
                (at + skipped, *piece.offsets[1:]),
                (len(range(low, high, rows.step)), *piece.sizes[1:]),
                _strides(piece, rows.step),
            )
        at += rows.count


def _row_stride(piece: Piece) -> int:
    return piece.strides[0] if piece.strides is not None else math.prod(piece.sizes[1:])


def _strides(piece: Piece, step: int) -> tuple[int, ...] | None:
    if step == 1:
        return piece.strides
    rest = piece.strides or tuple(
        math.prod(piece.sizes[at + 1 :]) for at in range(len(piece.sizes))
    )
    return (step * rest[0], *rest[1:])
