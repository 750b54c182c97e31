"""Which tensors of a model a node's workers take, where its layers are spread over nodes.

By vLLM's own rules, for architectures whose code was read for it: others are prepared whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

_PARTITION = "VLLM_PP_LAYER_PARTITION"
# vllm/model_executor/models: embeddings on the first stage alone, and on the last where they are
# tied; norm and head on the last alone (llama.py, qwen2.py, qwen3.py).
_ENDS = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    }
)
# All but the layers on every stage (mixtral.py, qwen2_moe.py, qwen3_moe.py, gemma2.py, gemma3.py).
_LAYERS = frozenset(
    {
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "MixtralForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
    }
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_FIRST, _LAST, _HEAD = "model.embed_tokens.", ("model.norm.", "lm_head."), "lm_head.weight"
# With these, workers take other tensors than the model's own code says, or read them otherwise.
_OTHERWISE = (
    "config",
    "hf_overrides",
    "load_format",
    "model_loader_extra_config",
    "speculative_config",
    "spec_method",
    "spec_model",
    "spec_tokens",
    "data_parallel_size",
)


@dataclass(frozen=True, slots=True)
class Stage:
    """Pipeline stages ``[first, end)`` of *count*: what one node's workers hold."""

    first: int
    end: int
    count: int

    def layers(self, count: int) -> range:
        """Return which of *count* layers, as vLLM's ``get_pp_indices`` (distributed/utils.py).

        Raises:
            ValueError: VLLM_PP_LAYER_PARTITION does not fit.
        """
        if given := os.environ.get(_PARTITION):
            parts = [int(part) for part in given.split(",")]
            if len(parts) != self.count or sum(parts) != count:
                raise ValueError(f"{_PARTITION}={given} is not of {count} layers in {self.count}")
        else:
            parts = [count // self.count] * self.count
            for place in range(2, count % self.count + 2):
                parts[-place] += 1
        return range(sum(parts[: self.first]), sum(parts[: self.end]))

    def knows(self, config: Mapping[str, object]) -> bool:
        """Return whether it is known which tensors a stage of the model with *config* takes."""
        names, count = config.get("architectures"), config.get("num_hidden_layers")
        if not isinstance(names, list) or len(names) != 1 or type(count) is not int:
            return False
        try:
            self.layers(count)
        except ValueError:
            return False  # vLLM will say it
        return names[0] in _ENDS | _LAYERS

    def needed(self, names: Collection[str], config: Mapping[str, object]) -> frozenset[str]:
        """Return those of a model's tensors that these stages take, where ``knows`` it."""
        count, architectures = config["num_hidden_layers"], config["architectures"]
        assert isinstance(count, int)
        assert isinstance(architectures, list)
        layers = self.layers(count)
        tied = config.get("tie_word_embeddings")
        is_tied = tied if isinstance(tied, bool) else _HEAD not in names
        is_first, is_last = self.first == 0, self.end == self.count

        def is_needed(name: str) -> bool:
            if layer := _LAYER.match(name):
                return int(layer[1]) in layers or int(layer[1]) >= count
            if architectures[0] in _LAYERS:
                return True
            if name.startswith(_FIRST):
                return is_first or (is_last and is_tied)
            return is_last or not name.startswith(_LAST)

        return frozenset(filter(is_needed, names))


@dataclass(frozen=True, slots=True)
class Share:
    """What a node's workers take of the model with *config*."""

    stage: Stage
    config: Mapping[str, object]

    def needed(self, names: Collection[str]) -> frozenset[str]:
        """Return those of its tensors."""
        return self.stage.needed(names, self.config)

    @property
    def text(self) -> str:
        """What it is, for people; another share of the model has another."""
        stage, count = self.stage, self.config["num_hidden_layers"]
        assert isinstance(count, int)
        layers = stage.layers(count)
        last = f"-{stage.end}" if stage.end > stage.first + 1 else ""
        return (
            f"pipeline stage {stage.first + 1}{last} of {stage.count}: layers {layers.start} to "
            f"{layers.stop - 1} of {count}"
        )


def find_stage(engine_args: Mapping[str, object]) -> Stage | None:
    """Return the stages of the node that *engine_args* name; None where it takes all layers.

    vLLM gives each node as many of the workers, one pipeline stage after the other.
    """
    nodes, rank = _number(engine_args, "nnodes", 1), _number(engine_args, "node_rank", 0)
    stages = _number(engine_args, "pipeline_parallel_size", 1)
    width = _number(engine_args, "tensor_parallel_size", 1)
    width *= _number(engine_args, "prefill_context_parallel_size", 1)
    workers = stages * width
    if any(engine_args.get(name) not in (None, 1) for name in _OTHERWISE):
        return None
    if nodes < 2 or stages < 2 or workers % nodes or not 0 <= rank < nodes:
        return None
    each = workers // nodes
    first, end = rank * each // width, -(-(rank + 1) * each // width)
    return Stage(first, end, stages) if end - first < stages else None


def _number(engine_args: Mapping[str, object], name: str, otherwise: int) -> int:
    value = engine_args.get(name, otherwise)
    return value if type(value) is int and value >= 0 else otherwise
