"""torchtitan's and torchtune's decoders: their own names, and rotary halves beside each other.

::

    torchtitan   layers.<i>.attention[.qkv_linear].wq.weight   attention_norm   feed_forward.w1
    torchtune    layers.<i>.attn.q_proj.weight                 sa_norm.scale    mlp.w1

Both keep Llama's queries and keys as Meta does, where transformers has the even rows of each head
before the odd ones; models of Qwen they keep as transformers does. Source:
torchtitan/models/llama3/state_dict_adapter.py and torchtune/models/convert_weights.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from loader.errors import UnsupportedError
from loader.weights.formats.tensor_names import is_of_model, strip_wrappers
from loader.weights.formats.views import Heads, Rows, View

EMBEDDING = "tok_embeddings.weight"
_LEAD = re.compile(r"^(model\.|module\.|app\.)*")
_LAYER = re.compile(r"^layers\.(?P<number>\d+)\.(?P<rest>.+)\.(?P<kind>weight|bias|scale)$")
_MODULES = {
    "attention_norm": "input_layernorm",
    "sa_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.wo": "self_attn.o_proj",
    "attn.output_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attn.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attn.k_norm": "self_attn.k_norm",
} | {
    f"{mlp}.{theirs}": f"mlp.{ours}"
    for mlp in ("feed_forward", "mlp")
    for theirs, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
}
_ATTENTION = re.compile(
    r"^(attention\.(qkv_linear\.)?w(?P<titan>[qkv])|attn\.(?P<tune>[qkv])_proj)$"
)
_OUTSIDE = {
    EMBEDDING: "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "norm.scale": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "lm_head.weight": "lm_head.weight",
}
_ROTARY = {"llama": True, "mistral": True, "qwen2": False, "qwen3": False}  # halves interleaved


def is_titan(names: Iterable[str]) -> bool:
    """Return whether a checkpoint's tensors are called as torchtitan or torchtune calls them."""
    bare = {_bare(name) for name in names}
    return EMBEDDING in bare and any(name.startswith("layers.") for name in bare)


def find_views(
    shapes: Mapping[str, tuple[int, ...]], heads: Heads, model_type: str, where: str
) -> Mapping[str, View]:
    """Return transformers' name -> where in the trainer's tensors (name -> shape) it lies.

    Raises:
        UnsupportedError: a sort of model whose layout is not known.
    """
    if model_type not in _ROTARY:
        raise UnsupportedError(
            "a model of torchtitan or torchtune whose layout is not known",
            where=where,
            expected=", ".join(sorted(_ROTARY)),
            got=model_type or "no model_type in config.json",
            next_step="save it in Hugging Face's format: checkpoint.last_save_in_hf in "
            "torchtitan, FullModelHFCheckpointer in torchtune",
        )
    found: dict[str, View] = {}
    for name, shape in shapes.items():
        bare = _bare(name)
        if not is_of_model(name):
            continue
        match = _LAYER.match(bare)
        attention = _ATTENTION.match(match["rest"]) if match else None
        rows: tuple[Rows, ...] = (Rows(0, shape[0]),) if shape else ()
        if match and attention:
            which = attention["titan"] or attention["tune"]
            if which in "qk" and _ROTARY[model_type]:
                rows = _apart(shape[0], heads.size)
            ours = f"self_attn.{which}_proj.{match['kind']}"
        elif match and match["rest"] in _MODULES:
            ours = f"{_MODULES[match['rest']]}.{match['kind'].replace('scale', 'weight')}"
        else:
            found[_OUTSIDE.get(bare, name)] = View(name, None, rows)
            continue
        found[f"model.layers.{match['number']}.{ours}"] = View(name, None, rows)
    return found


def _bare(name: str) -> str:
    return _LEAD.sub("", strip_wrappers(name))


def _apart(rows: int, head: int) -> tuple[Rows, ...]:
    """Return the even rows of each head, then its odd ones."""
    return tuple(
        Rows(start + odd, min(start + head, rows), 2)
        for start in range(0, rows, head)
        for odd in (0, 1)
    )
