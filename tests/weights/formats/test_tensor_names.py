"""From a trainer's names to the model's: prefixes by rule, ties and buffers as transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig

from loader.errors import CheckpointError
from loader.weights.formats.expected import ModelNames, read_model_names
from loader.weights.formats.tensor_names import match_names


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelNames:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=20, num_hidden_layers=2, architectures=["LlamaForCausalLM"], **sizes
    )
    folder = tmp_path_factory.mktemp("llama")
    config.save_pretrained(folder)
    return read_model_names(folder)


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "module.",
        "_fsdp_wrapped_module.",
        "_orig_mod.",
        "module._orig_mod.",
        "model._orig_mod._fsdp_wrapped_module.",
        "app.model.",
    ],
)
def test_prefixes_of_trainers(llama: ModelNames, prefix: str) -> None:
    found = {prefix + name: shape for name, shape in llama.shapes.items()}
    match = match_names(found, llama, "here")
    assert match.names == {name: prefix + name for name in llama.shapes}
    assert list(match.names) == list(llama.shapes)


def test_wrappers_within_a_name(llama: ModelNames) -> None:
    def wrapped(name: str) -> str:
        return name.replace(
            "layers.0.", "layers.0._checkpoint_wrapped_module._fsdp_wrapped_module."
        )

    found = {wrapped(name): shape for name, shape in llama.shapes.items()}
    assert match_names(found, llama, "here").names == {name: wrapped(name) for name in llama.shapes}


def test_what_stands_beside_the_model(llama: ModelNames) -> None:
    others = [
        "optimizer.state.model.norm.weight.exp_avg",
        "rng_state",
        "lr_scheduler.step",
        "epoch",
    ]
    found = {f"model.{name}": shape for name, shape in llama.shapes.items()}
    assert match_names(found | dict.fromkeys(others, (1,)), llama, "here").names.keys() == (
        llama.shapes.keys()
    )


def test_buffers_that_the_model_makes_by_itself(llama: ModelNames, tmp_path: Path) -> None:
    """Of today's code, and those that old checkpoints hold."""
    assert "model.rotary_emb.inv_freq" in llama.droppable
    found = {**llama.shapes, "model.rotary_emb.inv_freq": (4,)}
    assert match_names(found, llama, "here").names.keys() == llama.shapes.keys()
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, architectures=["GPT2LMHeadModel"])
    config.save_pretrained(tmp_path)
    gpt2 = read_model_names(tmp_path)
    found = {**gpt2.shapes, "transformer.h.0.attn.bias": (1, 1, 1024, 1024)}
    assert "transformer.h.0.attn.bias" not in match_names(found, gpt2, "here").names


def test_tied_weights_are_given_once(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, architectures=["GPT2LMHeadModel"])
    config.save_pretrained(tmp_path)
    gpt2 = read_model_names(tmp_path)
    match = match_names(dict(gpt2.shapes), gpt2, "here")
    assert "lm_head.weight" not in match.names
    assert match.copies == {"transformer.wte.weight": ("lm_head.weight",)}
    # Either of them will do.
    alone = {n: s for n, s in gpt2.shapes.items() if n != "transformer.wte.weight"}
    assert match_names(alone, gpt2, "here").names["transformer.wte.weight"] == "lm_head.weight"


def test_all_that_is_wrong_is_told_at_once(llama: ModelNames) -> None:
    found = dict(llama.shapes)
    del found["model.norm.weight"]
    found["model.layers.2.mlp.up_proj.weight"] = (32, 16)
    found["lm_head.weight"] = (21, 16)
    with pytest.raises(CheckpointError, match="not the model") as error:
        match_names(found, llama, "here")
    assert error.value.problems == (
        "missing: model.norm.weight",
        "unexpected: model.layers.2.mlp.up_proj.weight",
        "another shape: lm_head.weight: [21, 16], the model has [20, 16]",
    )
