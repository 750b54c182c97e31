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

import re
from collections.abc import Iterable, Mapping, Sequence

from loader.errors import CheckpointError, UnsupportedError
from loader.weights.consolidate.names import is_of_model
from loader.weights.consolidate.views import Heads, Rows, View

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


def is_megatron(names: Iterable[str]) -> bool:
    """Return whether a checkpoint's tensors are called as Megatron-Core's GPT calls them."""
    bare = {_LEAD.sub("", name) for name in names}
    return EMBEDDING in bare and any(_LAYER.match(name) for name in bare)


def find_views(
    shapes: Mapping[str, tuple[int, ...]], heads: Heads, where: str
) -> Mapping[str, View]:
    """Return transformers' name -> where in Megatron's tensors (name -> shape) it lies.

    Raises:
        UnsupportedError: tensors that have no such name; all are listed.
        CheckpointError: fused tensors that *heads* do not make up.
    """
    found: dict[str, View] = {}
    unknown, fused = [], []
    for name, shape in shapes.items():
        bare = _LEAD.sub("", name)
        if not is_of_model(bare) or _STATE.search(bare):
            continue
        if bare in _OUTSIDE:
            rows = min(shape[0], heads.vocabulary) if len(shape) > 1 else shape[0]
            found[_OUTSIDE[bare]] = View(name, None, (Rows(0, rows),))
            continue
        match = _LAYER.match(bare)
        stacked = match is not None and match["number"] is None
        inner = shape[1:] if stacked else shape
        parts = _split(match["rest"], inner, heads) if match and inner else None
        if match is None or parts is None:
            unknown.append(f"{name}: {list(shape)}")
            continue
        if not parts:
            fused.append(f"{name}: {list(shape)} is not made of {heads}")
        for layer in range(shape[0]) if stacked else [int(match["number"])]:
            for suffix, runs in parts.items():
                view = View(name, layer if stacked else None, runs)
                found[f"model.layers.{layer}.{suffix}"] = view
    _refuse(unknown, fused, where)
    return found


def _split(rest: str, shape: tuple[int, ...], heads: Heads) -> dict[str, tuple[Rows, ...]] | None:
    """Return transformers' names for a layer's tensor, each with its rows.

    None where there are none, nothing where the rows are not what *heads* make up.
    """
    rows = shape[0]
    if rest in _WHOLE:
        return {_WHOLE[rest]: (Rows(0, rows),)}
    if match := _GATED.match(rest):
        kind, half = match["kind"], rows // 2
        if rows % 2:
            return {}
        return {
            f"mlp.gate_proj.{kind}": (Rows(0, half),),
            f"mlp.up_proj.{kind}": (Rows(half, rows),),
        }
    if match := _QKV.match(rest):
        return _split_qkv(match["kind"], rows, heads)
    return None


def _split_qkv(kind: str, rows: int, heads: Heads) -> dict[str, tuple[Rows, ...]]:
    if heads.queries % heads.groups or rows != (heads.queries + 2 * heads.groups) * heads.size:
        return {}
    queries = heads.queries // heads.groups * heads.size
    group = queries + 2 * heads.size
    starts = range(0, rows, group)
    key = queries + heads.size
    return {
        f"self_attn.q_proj.{kind}": tuple(Rows(s, s + queries) for s in starts),
        f"self_attn.k_proj.{kind}": tuple(Rows(s + queries, s + key) for s in starts),
        f"self_attn.v_proj.{kind}": tuple(Rows(s + key, s + group) for s in starts),
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
