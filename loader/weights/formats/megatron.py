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

What the tensors do not tell is in the arguments of the training, which lie beside them: Megatron-LM
keeps them in common.pt, Megatron Bridge in run_config.yaml.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Iterable, Mapping, Sequence

from loader.errors import CheckpointError, FormatError, UnsupportedError
from loader.weights.formats.archive import Archive
from loader.weights.formats.rank_files import Files, read_all
from loader.weights.formats.tensor_names import is_of_model
from loader.weights.formats.views import Heads, Rows, View

EMBEDDING = "embedding.word_embeddings.weight"
_LEAD = re.compile(r"^(model\.|module\.)*")
_LAYER = re.compile(r"^decoder\.layers\.((?P<number>\d{1,6})\.)?(?P<rest>.+)$")
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
_EXPORT = (
    "export the model in the training job, with Megatron Bridge or the converter that comes with "
    "the trainer"
)
_QKV = re.compile(r"^self_attention\.linear_qkv\.(?P<kind>weight|bias)$")
_GATED = re.compile(r"^mlp\.linear_fc1\.(?P<kind>weight|bias)$")
_OUTSIDE = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
_STATE = re.compile(r"\._extra_state(/|$)")  # of Transformer Engine's layers
# Models whose norms and rotary embedding are computed as Megatron does without the switches below.
_MODELS = ("llama", "mistral", "qwen2", "qwen3")
# Switches that change what the same tensors mean, in the names of both.
_SWITCHES = {
    "apply_layernorm_1p": "1 is added to the weights of norms",
    "layernorm_zero_centered_gamma": "1 is added to the weights of norms",
    "rotary_interleaved": "rotary halves lie beside each other",
    "apply_residual_connection_post_layernorm": "residuals are taken behind the norms",
}
_ARGUMENTS, _RUN_CONFIG = "common.pt", "run_config.yaml"
_MAX_CONFIG_BYTES = 1 << 24
_MOST_LAYERS = _MOST_HEADS = 1 << 16


def is_megatron(names: Iterable[str]) -> bool:
    """Return whether a checkpoint's tensors are called as Megatron-Core's GPT calls them."""
    bare = {_LEAD.sub("", name) for name in names}
    return EMBEDDING in bare and any(_LAYER.match(name) for name in bare)


def refuse_other_models(files: Files, model_type: str, where: str) -> None:
    """Raise UnsupportedError for what no Hugging Face model computes from the same tensors."""
    if model_type not in _MODELS:
        raise UnsupportedError(
            "a model of Megatron whose layout is not known",
            where=where,
            expected=", ".join(_MODELS),
            got=model_type or "no model_type in config.json",
            next_step=_EXPORT,
        )
    if problems := [
        f"{name} in {file}: {_SWITCHES[name]}"
        for file, found in _find_switches(files).items()
        for name in found
    ]:
        raise UnsupportedError(
            "a Megatron checkpoint of a model that Hugging Face computes in another way",
            where=where,
            expected="these switches off: the tensors do not tell",
            problems=problems,
            next_step=_EXPORT,
        )


def _find_switches(files: Files) -> Mapping[str, Sequence[str]]:
    """Return those that are on, by the file that says so."""
    found: dict[str, Sequence[str]] = {}
    if _ARGUMENTS in files.names:
        archive = Archive(files.open(_ARGUMENTS))
        if len(archive.pickled) > _MAX_CONFIG_BYTES:
            raise FormatError(
                "a file of training arguments that is too large for one",
                where=archive.where,
                expected=f"at most {_MAX_CONFIG_BYTES} bytes beside its tensors",
                got=f"{len(archive.pickled)} bytes",
                next_step="fetch it again; if it is what the trainer wrote, convert the checkpoint "
                "in the training job",
            )
        found[_ARGUMENTS] = _read_switches(archive)
    if _RUN_CONFIG in files.names:
        text = read_all(files.open(_RUN_CONFIG), limit_bytes=_MAX_CONFIG_BYTES).decode(
            "utf-8", "replace"
        )
        pattern = re.compile(r"^[ \t]*(\w+):[ \t]*true[ \t\r]*$", re.MULTILINE)
        found[_RUN_CONFIG] = sorted(set(pattern.findall(text)) & _SWITCHES.keys())
    return found


def _read_switches(archive: Archive) -> Sequence[str]:
    """Return those that a pickle sets to True, read from its opcodes: nothing in it is made.

    Raises:
        FormatError: it is no pickle.
    """
    found = set()
    name = None
    try:
        for opcode, value, _ in pickletools.genops(archive.pickled):
            if opcode.name == "NEWTRUE" and name in _SWITCHES:
                found.add(name)
            if opcode.name not in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):  # keep a name in passing
                name = value if isinstance(value, str) else None
    except ValueError as error:
        raise FormatError(
            "a file of training arguments that cannot be read",
            where=archive.where,
            got=str(error)[:200],
            next_step="fetch it again",
        ) from error
    return sorted(found)


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
        if match is None or parts is None or (stacked and shape[0] > _MOST_LAYERS):
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
    if (
        heads.groups > _MOST_HEADS
        or heads.queries % heads.groups
        or rows != (heads.queries + 2 * heads.groups) * heads.size
    ):
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
            next_step=_EXPORT,
        )
    if fused:
        raise CheckpointError(
            "a Megatron checkpoint that is not the model its config.json describes",
            where=where,
            problems=fused,
            next_step="give the config.json of the model that was trained",
        )
