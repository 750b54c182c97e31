"""What transformers' classes say of a model: names, layouts, ties; and which need not be asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.architectures import Case, build
from loader.adapters.plan_builder import PLAIN_FAMILIES, PLAIN_LAYERS, Base, UnaskedError
from loader.weights.architecture import Architecture, Piece, read_architecture
from loader.weights.header import TensorInfo


def infos(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, "F32", shape, 0, 0) for name, shape in shapes.items()}


def architecture_of(config: transformers.PreTrainedConfig, name: str, **disk: Any) -> Architecture:
    found = read_architecture(config.to_dict() | {"architectures": [name]}, infos(disk))
    assert found is not None
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(PLAIN_FAMILIES))
def test_a_plain_family_is_plain(family: str) -> None:
    """Its layers bear their own names on disk, are Linear, and share nothing."""
    model = build(Case(family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = architecture_of(model.config, type(model).__name__, **shapes)
    assert model.base_model_prefix == "model"
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in PLAIN_LAYERS
    ]
    assert layers
    for name, module in layers:
        assert isinstance(module, torch.nn.Linear)
        weight = f"{name}.weight"
        assert found.pieces[weight] == (Piece.whole(weight, shapes[weight]),)
        assert weight not in found.tied


def test_a_plain_layer_is_found_without_asking() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    base = Base(infos({name: (6, 4)}), {"model_type": "llama"}, quick=True)
    for spelled in ("model.layers", "layers", "model.language_model.layers"):
        place = base.find(f"{spelled}.0.mlp.up_proj")
        assert place is not None
        assert place.whole == name
    assert base.find("model.layers.7.mlp.up_proj") is None
    with pytest.raises(UnaskedError):
        base.find("lm_head")


def test_experts_and_their_stack() -> None:
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    place = "model.layers.0.block_sparse_moe.experts"
    disk = {f"{place}.{e}.{w}.weight": (6, 8) for e in range(2) for w in ("w1", "w3")}
    found = architecture_of(config, "MixtralForCausalLM", **disk)
    pieces = found.pieces["model.layers.0.mlp.experts.gate_up_proj"]
    assert {(p.tensor, p.expert, p.offset) for p in pieces} == {
        (f"{place}.{e}.{w}.weight", e, 6 * i) for e in range(2) for i, w in enumerate(("w1", "w3"))
    }


def test_what_is_no_class_is_not_known() -> None:
    assert read_architecture({"model_type": "jais"}, {}) is None
    assert read_architecture({}, {}) is None
    assert read_architecture({"model_type": "llama", "hidden_size": "wide"}, {}) is None
