"""How much memory a model takes while it is served: from its config.json and its bytes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_GATED_MLP = 3  # gate, up and down
# vllm/config/model.py, ModelDType.
_ASKED = {
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What of a model decides the memory that it takes.

    ``weight_bytes`` are those of the weights as they are served, in ``dtype`` (``auto`` for a
    quantized model); ``context`` is the longest sequence that the model knows, if it says.
    """

    weight_bytes: int
    weights_from: str
    dtype: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    context: int | None
    encoder_positions: int = 0
    latent: bool = False

    def kv_bytes(self, tokens: int, gpus: int = 1) -> int:
        """Return what the KV cache of a sequence of *tokens* takes on each of *gpus*.

        Key and value of every head, layer and token, in two bytes each; a head that cannot be
        split is kept by every GPU. Latent attention (MLA) keeps one vector for both. Windows of
        attention are not counted on: it is an upper bound.
        """
        kept = 1 if self.latent else 2
        heads = 1 if self.latent else max(1, -(-self.kv_heads // gpus))
        return kept * self.layers * heads * self.head_dim * 2 * (tokens + self.encoder_positions)

    def lora_bytes(self, rank: int, slots: int, gpus: int = 1) -> int:
        """Return what vLLM sets aside for *slots* adapters on each of *gpus*.

        A: (rank, in) and B: (out, rank) of every linear layer, whether an adapter has it or not.
        """
        attention = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        sums = 2 * (self.hidden + attention) + 2 * (self.hidden + kv)
        sums += _GATED_MLP * (self.hidden + self.intermediate)
        return self.layers * sums * rank * 2 * slots // gpus


def size_of(config: Mapping[str, object], stored_bytes: int | None, came_from: str) -> ModelSize:
    """Return the size of the model that *config* (a config.json) describes.

    ``stored_bytes`` are those of its weight files, None where nobody knows: then the parameters are
    counted from the config. ``came_from`` says where the bytes were read, for people.
    """
    text = _text_config(config)
    dtype = "auto" if is_quantized(config) else _served_dtype(stored_dtype(config) or "bfloat16")
    if stored_bytes is None:
        weight_bytes = count_parameters(config) * _DTYPE_BYTES.get(dtype, 2)
        came_from = "parameters counted from config.json"
    else:
        weight_bytes = served_bytes(config, stored_bytes)
    heads = _number(text, "num_attention_heads", "n_head", "decoder_attention_heads")
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    latent = _number(text, "kv_lora_rank")
    head_dim = _number(text, "head_dim") or (hidden // heads if heads else 0)
    if latent:
        head_dim = latent + _number(text, "qk_rope_head_dim")
    return ModelSize(
        weight_bytes=weight_bytes,
        weights_from=came_from,
        dtype=dtype,
        layers=_number(text, "num_hidden_layers", "n_layer", "decoder_layers"),
        heads=heads,
        kv_heads=_number(text, "num_key_value_heads") or heads,
        head_dim=head_dim,
        hidden=hidden,
        intermediate=_number(text, "intermediate_size", "decoder_ffn_dim") or 4 * hidden,
        context=_number(text, "max_target_positions", "max_position_embeddings", "n_positions")
        or None,
        encoder_positions=_number(text, "max_source_positions"),
        latent=bool(latent),
    )


def served_bytes(config: Mapping[str, object], stored_bytes: int, asked: object = None) -> int:
    """Return the bytes of weights as they are served, *stored_bytes* in their files.

    *asked* is the engine's ``dtype``, if it is given.
    """
    stored = stored_dtype(config) or "bfloat16"
    if is_quantized(config) or stored not in _DTYPE_BYTES:
        return stored_bytes
    served = _ASKED.get(str(asked), _served_dtype(stored))
    return stored_bytes * _DTYPE_BYTES[served] // _DTYPE_BYTES[stored]


def is_quantized(config: Mapping[str, object]) -> bool:
    """Return whether the weights of a config.json are stored as they are served, packed."""
    text = _text_config(config)
    return bool(config.get("quantization_config") or text.get("quantization_config"))


def stored_dtype(config: Mapping[str, object]) -> str:
    """Return what a config.json says that its weights are stored in, empty where it does not."""
    text = _text_config(config)
    found = text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or ""
    return str(found).removeprefix("torch.")


def dtype_bytes(dtype: str) -> int:
    """Return the bytes of one number of *dtype*, two where it is not known."""
    return _DTYPE_BYTES.get(dtype, 2)


def count_parameters(config: Mapping[str, object]) -> int:
    """Return about how many parameters a decoder of this config has; 0 where it does not say."""
    text = _text_config(config)
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    heads = _number(text, "num_attention_heads", "n_head", "decoder_attention_heads")
    kv_heads = _number(text, "num_key_value_heads") or heads
    head_dim = _number(text, "head_dim") or (hidden // heads if heads else 0)
    experts = _number(text, "num_experts", "num_local_experts", "n_routed_experts")
    wide = _number(text, "intermediate_size", "decoder_ffn_dim") or 4 * hidden
    if experts:
        wide = (_number(text, "moe_intermediate_size") or wide) * experts
    layer = 2 * hidden * (heads + kv_heads) * head_dim + _GATED_MLP * hidden * wide
    layers = _number(text, "num_hidden_layers", "n_layer", "decoder_layers")
    embeddings = 1 if config.get("tie_word_embeddings") else 2
    return layers * layer + embeddings * _number(text, "vocab_size") * hidden


def _served_dtype(stored: str) -> str:
    """Return what vLLM makes of weights: float32 is cast down, as its ``auto`` does."""
    return stored if stored in ("bfloat16", "float16") else "bfloat16"


def _text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the part that describes the decoder; models of several senses nest it."""
    for name in ("text_config", "llm_config", "language_config"):
        inner = config.get(name)
        if isinstance(inner, Mapping):
            return {**config, **inner}
    return config


def _number(config: Mapping[str, object], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if type(value) is int and value > 0:
            return value
    return 0
