"""Zeros in an adapter: a module that was never reached, or an adapter that changes nothing."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loader.adapters.attach import NamedAdapter, attach
from loader.adapters.merge import WeightedAdapter, merge
from loader.errors import AdapterError
from tests.adapters.peft import differing, merged_state, state
from tests.models import tiny_llama, train_or_draw_lora


def zero(adapter: Path, *parts: str) -> None:
    """Make zeros of every tensor whose name holds one of *parts*."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if any(part in name for part in parts):
            tensors[name] = torch.zeros_like(tensor)
    save_file(tensors, file)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "base", dtype=torch.bfloat16)


def test_modules_that_training_never_reached(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = train_or_draw_lora(base, tmp_path / "adapter")
    zero(adapter, "layers.1.self_attn.q_proj.lora_B", "layers.1.self_attn.v_proj.lora_B")
    ready = attach(base, [NamedAdapter("a", adapter)], tmp_path / "tokenizer")
    assert [a.name for a in ready.adapters] == ["a"]
    assert "no effect of 2 of its modules" in caplog.text
    out = merge(base, [WeightedAdapter(adapter)], tmp_path / "out", exact="peft").path
    assert not differing(state(out), merged_state(base, adapter))


@pytest.mark.parametrize("part", ["lora_B", "lora_A"])
def test_an_adapter_of_which_nothing_works(base: Path, tmp_path: Path, part: str) -> None:
    adapter = train_or_draw_lora(base, tmp_path / "adapter")
    zero(adapter, part)
    with pytest.raises(AdapterError, match="change nothing") as error:
        attach(base, [NamedAdapter("a", adapter)], tmp_path / "tokenizer")
    assert len(error.value.problems) == 4
    with pytest.raises(AdapterError, match="change nothing"):
        merge(base, [WeightedAdapter(adapter)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def set_config(adapter: Path, **values: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_product_that_is_scaled_by_zero(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = train_or_draw_lora(base, tmp_path / "adapter")
    set_config(adapter, lora_alpha=0, alpha_pattern={r"^model\.layers\.1\..*q_proj": 4})
    attach(base, [NamedAdapter("a", adapter)], tmp_path / "tokenizer")
    assert "no effect of 3 of its modules" in caplog.text
    set_config(adapter, alpha_pattern={})
    with pytest.raises(AdapterError, match="change nothing") as error:
        attach(base, [NamedAdapter("a", adapter)], tmp_path / "tokenizer")
    assert "lora_alpha of 0" in error.value.problems[0]
    with pytest.raises(AdapterError, match="change nothing"):
        merge(base, [WeightedAdapter(adapter)], tmp_path / "out")


def test_a_head_that_was_trained_beside_zeros(base: Path, tmp_path: Path) -> None:
    adapter = train_or_draw_lora(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    zero(adapter, "lora_B")
    out = merge(base, [WeightedAdapter(adapter)], tmp_path / "out", exact="peft").path
    assert not differing(state(out), merged_state(base, adapter))


def test_a_factor_that_does_not_fit_is_not_read(base: Path, tmp_path: Path) -> None:
    """It may be of any size: here of 256 GiB, all of them a hole."""
    adapter = train_or_draw_lora(base, tmp_path / "adapter")
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    size = 1 << 38
    header = json.dumps(
        {
            f"{stem}A.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
            f"{stem}B.weight": {"dtype": "U8", "shape": [0], "data_offsets": [size, size]},
        }
    ).encode()
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(file, 8 + len(header) + size)
    with pytest.raises(AdapterError, match="fit") as merging:
        merge(base, [WeightedAdapter(adapter)], tmp_path / "out")
    with pytest.raises(AdapterError, match="fit") as attaching:
        attach(base, [NamedAdapter("a", adapter)], tmp_path / "tokenizer")
    for caught in (merging, attaching):
        assert "empty" in str(caught.value)
