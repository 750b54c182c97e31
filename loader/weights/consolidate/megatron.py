"""Megatron-Core's distributed checkpoints (``torch_dist``): its fused, stacked tensors in parts.

::

    embedding.word_embeddings.weight                        [padded vocabulary, hidden]
    decoder.layers[.<i>].self_attention.linear_qkv.weight   per group: queries, key, value
    decoder.layers[.<i>].mlp.linear_fc1.weight              gate, then up
    output_layer.weight                                     [padded vocabulary, hidden]

``.metadata`` describes each tensor as a whole, however it was cut by tensor and pipeline
parallelism; config.json says how many heads and groups make up a fused one. Layers are stacked, or
numbered. Source of the layout: megatron/core/transformer/attention.py (``get_query_key_value_
tensors``) and megatron/core/transformer/mlp.py (``apply_swiglu_sharded_factory``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from loader.errors import CheckpointError, UnsupportedError
from loader.weights.consolidate.names import is_of_model
from loader.weights.consolidate.pieces import Piece, SourceTensor
from loader.weights.header import size_bytes

EMBEDDING = "embedding.word_embeddings.weight"
_LEAD = re.compile(r"^(model\.|module\.)*")
_LAYER = re.compile(r"^decoder\.layers\.((?P<number>\d+)\.)?(?P<rest>.+)$")
_WHOLE = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.linear_fc2.bias": "mlp.down_proj.bias",
}
_QKV = re.compile(r"^self_attention\.linear_qkv\.(?P<kind>weight|bias)$")
_GATED = re.compile(r"^mlp\.linear_fc1\.(?P<kind>weight|bias)$")
_OUTSIDE = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
_STATE = re.compile(r"\._extra_state(/|$)")  # of Transformer Engine's layers

Runs = tuple[tuple[int, int], ...]


class OpenableTensors(Protocol):
    """The part of a source that is looked at here; see ``consolidation.ShardedSource``."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    def open(self, names: Sequence[str], dtype: str | None) -> tuple[SourceTensor, ...]:
        """Return these tensors as pieces."""


@dataclass(frozen=True, slots=True)
class View:
    """Rows ``[start, end)`` of a tensor, one run behind the other; of one layer where stacked."""

    tensor: str
    layer: int | None
    runs: Runs


@dataclass(frozen=True, slots=True)
class Sizes:
    """What config.json says of the sizes that Megatron's tensors are fused by."""

    heads: int
    groups: int
    head: int
    vocabulary: int


def is_megatron(names: Iterable[str]) -> bool:
    """Return whether a checkpoint's tensors are called as Megatron-Core's GPT calls them."""
    bare = {_LEAD.sub("", name) for name in names}
    return EMBEDDING in bare and any(_LAYER.match(name) for name in bare)


class MegatronSource:
    """The tensors of a Megatron-Core GPT under the names that transformers' decoders have."""

    def __init__(self, source: OpenableTensors, config: Mapping[str, object], where: str) -> None:
        self._source = source
        self._views = _find_views(source.shapes, _read_sizes(config, where), where)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: _shape(view, source.shapes[view.tensor]) for name, view in self._views.items()
        }
        self.dtypes: Mapping[str, str] = {
            name: source.dtypes[view.tensor] for name, view in self._views.items()
        }

    def open(self, names: Sequence[str], dtype: str | None) -> tuple[SourceTensor, ...]:
        """Return the tensors of these names.

        Raises:
            CheckpointError: as the source, by Megatron's own names.
        """
        wanted = list(dict.fromkeys(self._views[name].tensor for name in names))
        opened = dict(zip(wanted, self._source.open(wanted, dtype), strict=True))
        by_layer = {name: _group_layers(tensor) for name, tensor in opened.items()}
        made = []
        for name in names:
            view, shape = self._views[name], self.shapes[name]
            tensor = opened[view.tensor]
            if view.layer is None:
                pieces = tensor.pieces
            else:
                pieces = tuple(by_layer[view.tensor].get(view.layer, ()))
            cut = tuple(part for piece in pieces for part in _cut_rows(piece, view.runs))
            made.append(SourceTensor(name, tensor.dtype, shape, shape, cut))
        return tuple(made)


def _read_sizes(config: Mapping[str, object], where: str) -> Sizes:
    text = config.get("text_config", config)
    fields = text if isinstance(text, dict) else config

    def number(name: str, otherwise: object = None) -> int:
        value = fields.get(name) or otherwise
        if type(value) is not int or value <= 0:
            raise CheckpointError(
                "a config.json that does not say how Megatron's tensors are fused",
                where=where,
                expected=f"{name}, a number",
                got=repr(value),
                next_step="put the config.json of the Hugging Face model beside the checkpoint, "
                "or set base_model to it",
            )
        return value

    heads = number("num_attention_heads")
    head = number("head_dim", number("hidden_size") // heads)
    groups = number("num_key_value_heads", heads)
    return Sizes(heads, groups, head, number("vocab_size"))


def _find_views(shapes: Mapping[str, tuple[int, ...]], sizes: Sizes, where: str) -> dict[str, View]:
    found: dict[str, View] = {}
    unknown, fused = [], []
    for name, shape in shapes.items():
        bare = _LEAD.sub("", name)
        if not is_of_model(bare) or _STATE.search(bare):
            continue
        if bare in _OUTSIDE:
            rows = min(shape[0], sizes.vocabulary) if len(shape) > 1 else shape[0]
            found[_OUTSIDE[bare]] = View(name, None, ((0, rows),))
            continue
        match = _LAYER.match(bare)
        stacked = match is not None and match["number"] is None
        inner = shape[1:] if stacked else shape
        parts = _split(match["rest"], inner, sizes) if match and inner else None
        if match is None or parts is None:
            unknown.append(f"{name}: {list(shape)}")
            continue
        if not parts:
            fused.append(f"{name}: {list(shape)} is not made of {sizes}")
        for layer in range(shape[0]) if stacked else [int(match["number"])]:
            for suffix, runs in parts.items():
                view = View(name, layer if stacked else None, runs)
                found[f"model.layers.{layer}.{suffix}"] = view
    _refuse(unknown, fused, where)
    return found


def _split(rest: str, shape: tuple[int, ...], sizes: Sizes) -> dict[str, Runs] | None:
    """Return transformers' names for a layer's tensor, each with its rows.

    None where there are none, nothing where the rows are not what *sizes* make up.
    """
    rows = shape[0]
    if rest in _WHOLE:
        return {_WHOLE[rest]: ((0, rows),)}
    if match := _GATED.match(rest):
        kind, half = match["kind"], rows // 2
        if rows % 2:
            return {}
        return {f"mlp.gate_proj.{kind}": ((0, half),), f"mlp.up_proj.{kind}": ((half, rows),)}
    if match := _QKV.match(rest):
        return _split_qkv(match["kind"], rows, sizes)
    return None


def _split_qkv(kind: str, rows: int, sizes: Sizes) -> dict[str, Runs]:
    if sizes.heads % sizes.groups or rows != (sizes.heads + 2 * sizes.groups) * sizes.head:
        return {}
    queries = sizes.heads // sizes.groups * sizes.head
    group = queries + 2 * sizes.head
    starts = range(0, rows, group)
    key = queries + sizes.head
    return {
        f"self_attn.q_proj.{kind}": tuple((s, s + queries) for s in starts),
        f"self_attn.k_proj.{kind}": tuple((s + queries, s + key) for s in starts),
        f"self_attn.v_proj.{kind}": tuple((s + key, s + group) for s in starts),
    }


def _refuse(unknown: Sequence[str], fused: Sequence[str], where: str) -> None:
    if unknown:
        raise UnsupportedError(
            "a Megatron checkpoint with tensors that have no name in Hugging Face's format",
            where=where,
            expected="a decoder of attention with fused QKV and a gated MLP, as Llama's",
            problems=unknown,
            next_step="export the model in the training job, with Megatron Bridge or the "
            "converter that comes with the trainer",
        )
    if fused:
        raise CheckpointError(
            "a Megatron checkpoint that is not the model its config.json describes",
            where=where,
            problems=fused,
            next_step="give the config.json of the model that was trained",
        )


def _shape(view: View, shape: tuple[int, ...]) -> tuple[int, ...]:
    rest = shape[1:] if view.layer is None else shape[2:]
    return (sum(end - start for start, end in view.runs), *rest)


def _group_layers(tensor: SourceTensor) -> dict[int, list[Piece]]:
    """Return the pieces of each layer of a stacked tensor, without the dimension of layers."""
    found: dict[int, list[Piece]] = {}
    for piece in tensor.pieces:
        for at in range(piece.sizes[0]):
            inner = _narrow(piece, at)
            found.setdefault(piece.offsets[0] + at, []).append(inner)
    return found


def _narrow(piece: Piece, index: int) -> Piece:
    """Return the part of *piece* at *index* of its first dimension, which goes."""
    stride = piece.strides[0] if piece.strides is not None else math.prod(piece.sizes[1:])
    start = piece.start + index * stride * size_bytes(piece.dtype, (1,))
    strides = None if piece.strides is None else piece.strides[1:]
    return Piece(piece.file, start, piece.dtype, piece.offsets[1:], piece.sizes[1:], strides)


def _cut_rows(piece: Piece, runs: Runs) -> Iterator[Piece]:
    """Give the parts of *piece* that lie in *runs* of rows, at their places behind each other."""
    stride = piece.strides[0] if piece.strides is not None else math.prod(piece.sizes[1:])
    first, last = piece.offsets[0], piece.offsets[0] + piece.sizes[0]
    at = 0
    for begin, end in runs:
        low, high = max(begin, first), min(end, last)
        if low < high:
            yield Piece(
                piece.file,
                piece.start + (low - first) * stride * size_bytes(piece.dtype, (1,)),
                piece.dtype,
                (at + low - begin, *piece.offsets[1:]),
                (high - low, *piece.sizes[1:]),
                piece.strides,
            )
        at += end - begin
