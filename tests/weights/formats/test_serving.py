"""Which files serving needs, from their names alone."""

from __future__ import annotations

import pytest

from loader.weights.formats.serving import is_shard, serving_files
from loader.weights.side_files import side_files

MODEL = ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "chat_template.jinja"]
STATE = ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json"]


def needed(*names: str, partitions: bool = False) -> set[str]:
    return set(serving_files([f"job/rank-0/c/{n}" for n in names], partitions=partitions))


def under(*names: str) -> set[str]:
    return {f"job/rank-0/c/{name}" for name in names}


def test_a_trainers_state_is_left_out() -> None:
    others = ["training_args.bin", "events.out.tfevents", "optimizer.safetensors", "README.md"]
    assert needed(*MODEL, *STATE, *others) == under(*MODEL)


def test_an_adapter_and_an_embedding_model() -> None:
    names = ["adapter_config.json", "adapter_model.safetensors", "modules.json"]
    names += ["1_Pooling/config.json", "config_sentence_transformers.json", "modeling_mine.py"]
    assert needed(*names, *STATE) == under(*names)


READ_BY_SERVERS = [
    "hf_quant_config.json",
    "quantize_config.json",
    "sentence_xlm-roberta_config.json",
    "1_Pooling/config.json",
    "spm.model",
    "bpe.codes",
    "vocab.bpe",
    "tokenizer.model.v3",
    "moonvit.py",
    "additional_chat_templates/tool.jinja",
]


@pytest.mark.parametrize("name", READ_BY_SERVERS)
def test_one_rule_for_what_stands_beside_weights(name: str) -> None:
    """What a base brings along comes with a checkpoint, too; ModelOpt's config says what F8 is."""
    assert needed(name) == under(name)
    assert name in side_files([name, "modules.json"])


def test_the_optimizers_folder_of_fsdp() -> None:
    model = ["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"]
    optimizer = ["optimizer_0/.metadata", "optimizer_0/__0_0.distcp", "optim/__0_0.distcp"]
    assert needed(*model, *optimizer) == under(*model)


def test_megatrons_arguments() -> None:
    names = (".metadata", "__0_0.distcp", "common.pt", "run_config.yaml")
    iteration = [f"iter_0000010/{name}" for name in names]
    tracker = "latest_checkpointed_iteration.txt"  # says whether an iteration is missing
    others = ["iter_0000010/metadata.json"]
    assert needed(*iteration, tracker, *others) == under(*iteration, tracker)


def test_zero_by_stage() -> None:
    optim = "global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    whole = "global_step10/mp_rank_00_model_states.pt"
    part = "global_step10/zero_pp_rank_0_mp_rank_00_model_states.pt"
    assert needed(whole, optim, "latest") == under(whole, "latest")
    assert needed(whole, optim, partitions=True) == under(whole, optim)
    assert needed(part, optim) == under(part, optim)


def test_the_stage_is_of_all_nodes_together() -> None:
    """Node 1 of stage 2 has nothing but its part of the optimizer."""
    whole = "j/rank-0/c/global_step1/mp_rank_00_model_states.pt"
    optim = "j/rank-1/c/global_step1/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert serving_files([whole, optim]) == {whole}


def test_the_universal_format() -> None:
    names = [f"g_universal/zero/w/{n}.pt" for n in ("fp32", "exp_avg", "exp_avg_sq", "step")]
    assert needed(*names) == under(names[0])


def test_shards() -> None:
    assert is_shard("a/__0_0.distcp")
    assert is_shard("a/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert is_shard("a/zero/w/fp32.pt")
    assert is_shard("a/shard-00001-model-00001-of-00001.safetensors")
    assert not is_shard("a/.metadata")
    assert not is_shard("a/model-00001-of-00002.safetensors")
