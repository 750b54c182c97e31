"""Which layers and tensors a node takes, by vLLM's own rules."""

from __future__ import annotations

from typing import Any

import pytest

from loader.serve.vllm.arguments import sizing_arguments
from loader.serve.vllm.stages import Share, Stage, find_stage


def _args(nodes: int, rank: int, stages: int, width: int = 1, **more: object) -> dict[str, Any]:
    return {
        "nnodes": nodes,
        "node_rank": rank,
        "pipeline_parallel_size": stages,
        "tensor_parallel_size": width,
    } | more


def test_layers_are_those_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.utils import get_pp_indices

    for count in range(1, 40):
        for stages in range(2, min(count, 9) + 1):
            for rank in range(stages):
                own = Stage(rank, rank + 1, stages).layers(count)
                assert (own.start, own.stop) == get_pp_indices(count, rank, stages)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,1,4")
    for rank in range(3):
        own = Stage(rank, rank + 1, 3).layers(8)
        assert (own.start, own.stop) == get_pp_indices(8, rank, 3)


@pytest.mark.parametrize(
    ("args", "stage"),
    [
        (_args(2, 0, 2), Stage(0, 1, 2)),
        (_args(2, 1, 2, 8), Stage(1, 2, 2)),
        (_args(2, 1, 4, 2), Stage(2, 4, 4)),
        (_args(4, 1, 2, 8), Stage(0, 1, 2)),  # two nodes share a stage
        (_args(4, 2, 2, 8), Stage(1, 2, 2)),
        (_args(2, 1, 3, 2), Stage(1, 3, 3)),  # the middle one is on both
        (_args(2, 0, 2, prefill_context_parallel_size=2), Stage(0, 1, 2)),
        (_args(1, 0, 2), None),
        (_args(2, 1, 1, 16), None),
        (_args(2, 0, 3, 1), None),  # vLLM refuses it
        (_args(2, 0, 2, load_format="runai_streamer"), None),
        (_args(2, 0, 2, hf_overrides={"num_hidden_layers": 2}), None),
        (_args(2, 0, 2, speculative_config={"method": "mtp"}), None),
        ({}, None),
    ],
)
def test_a_node_has_as_many_workers_as_any_other(args: dict[str, Any], stage: Stage | None) -> None:
    assert find_stage(args) == stage


@pytest.mark.parametrize(
    "word", ["-sc", "--spec-model", "--speculative-config.method", "--hf-overrides.vocab_size=3"]
)
def test_what_changes_a_model_is_found_among_vllms_words(word: str) -> None:
    words = ["-n", "2", "-r", "1", "-pp", "2"]
    assert find_stage(sizing_arguments(words)) == Stage(1, 2, 2)
    assert find_stage(sizing_arguments([*words, word, "5"])) is None


_NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(5)),
    "model.norm.weight",
    "lm_head.weight",
]


def _config(architecture: str = "LlamaForCausalLM", **more: object) -> dict[str, object]:
    return {"architectures": [architecture], "num_hidden_layers": 4} | more


@pytest.mark.parametrize(
    ("config", "left_out"),
    [
        (_config(), {0: {2, 3, "norm", "lm_head"}, 1: {0, 1, "embed_tokens"}}),
        (_config(tie_word_embeddings=True), {0: {2, 3, "norm", "lm_head"}, 1: {0, 1}}),
        (_config("MixtralForCausalLM"), {0: {2, 3}, 1: {0, 1}}),
    ],
)
def test_what_lies_beside_the_layers(
    config: dict[str, object], left_out: dict[int, set[object]]
) -> None:
    """The fifth layer is another head's, which any stage may want."""
    for rank, left in left_out.items():
        found = Share(Stage(rank, rank + 1, 2), config).needed(_NAMES)
        words = {part for name in set(_NAMES) - found for part in name.split(".")}
        assert {str(one) for one in left} <= words
        assert len(_NAMES) - len(found) == len(left)


@pytest.mark.parametrize(
    "config",
    [
        {},
        _config("OddForCausalLM"),
        {"architectures": ["LlamaForCausalLM"]},
        _config(num_hidden_layers="4"),
        {"architectures": "LlamaForCausalLM", "num_hidden_layers": 4},
    ],
)
def test_what_is_not_known_is_taken_whole(config: dict[str, object]) -> None:
    assert not Stage(0, 1, 2).knows(config)


@pytest.mark.parametrize("partition", ["1,2", "4", "a,b", "1,1,2"])
def test_a_partition_that_does_not_fit_is_left_to_vllm(
    monkeypatch: pytest.MonkeyPatch, partition: str
) -> None:
    assert Stage(0, 1, 2).knows(_config())
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", partition)
    assert not Stage(0, 1, 2).knows(_config())
