"""adapter_config.json, read as PEFT and vLLM read it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from vllm.config.lora import LoRAConfig
from vllm.lora.peft_helper import PEFTHelper

from loader.adapters.config import parse_adapter_config, read_adapter_config
from loader.errors import AdapterError, FormatError

BASIC = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def write(folder: Path, **values: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(BASIC | values))
    return folder


def test_what_peft_writes(tmp_path: Path) -> None:
    LoraConfig(
        r=6,
        lora_alpha=3,
        use_rslora=True,
        target_modules=["v_proj", "q_proj"],
        rank_pattern={"q_proj": 2},
        base_model_name_or_path="org/base",
    ).save_pretrained(tmp_path)
    config = read_adapter_config(tmp_path)
    assert (config.peft_type, config.base_model, config.rank) == ("LORA", "org/base", 6)
    assert config.scaling_of("model.v_proj") == 3 / math.sqrt(6)
    assert config.scaling_of("model.q_proj") == 3 / math.sqrt(2)
    assert config.max_rank == 6


PATTERNS = ["q_proj", "layers.0.*v_proj", r"^model\.layers\.1\..*", "o", "layers.10.x"]


@pytest.mark.parametrize(
    "module", ["a.q_proj", "q_proj", "aq_proj", "layers.0.z.v_proj", "model.layers.1.x", "foo", "o"]
)
def test_patterns_match_as_pefts_do(module: str) -> None:
    ranks = {pattern: i for i, pattern in enumerate(PATTERNS, 1)}
    config = parse_adapter_config({**BASIC, "rank_pattern": ranks, "alpha_pattern": ranks}, Path())
    theirs = ranks.get(get_pattern_key(ranks.keys(), module))
    assert config.rank_of(module) == (theirs or 8)
    assert config.alpha_of(module) == (theirs or 16)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 32}, "alpha_pattern": {"q_proj": 1}},
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["score"]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": False},
        {"alora_invocation_tokens": [1]},
        {"layer_replication": [[0, 2]]},
        {"use_bdlora": {"a": 1}},
        {"use_qalora": True},
    ],
)
def test_obstacles_are_vllms(tmp_path: Path, values: dict[str, Any]) -> None:
    folder = write(tmp_path, **values)
    refused = False
    try:
        helper = PEFTHelper.from_local_dir(str(folder), None)
        helper.validate_legal(LoRAConfig(max_lora_rank=512))
    except ValueError:
        refused = True
    assert bool(read_adapter_config(folder).attach_obstacles()) is refused


def test_obstacles_that_vllm_finds_only_in_the_tensors(tmp_path: Path) -> None:
    assert read_adapter_config(write(tmp_path, trainable_token_indices=[1])).attach_obstacles()
    assert "IA3" in read_adapter_config(write(tmp_path, peft_type="IA3")).attach_obstacles()[0]
    assert read_adapter_config(write(tmp_path, peft_type="OFT")).merge_obstacles()


def test_all_bad_values_at_once(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        r=0,
        lora_alpha="x",
        peft_type=None,
        rank_pattern={"a": -1, "(": 2},
        alpha_pattern=[],
    )
    with pytest.raises(AdapterError, match="PEFT refuses") as error:
        read_adapter_config(folder)
    assert len(error.value.problems) == 5
    assert "adapter_config.json" in error.value.where


def test_missing_and_malformed(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"missing adapter_config\.json"):
        read_adapter_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(FormatError, match="malformed JSON"):
        read_adapter_config(tmp_path)
