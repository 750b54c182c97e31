"""How vLLM spreads a model over a pipeline, in the sources of each release."""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loader.serve.vllm.releases import PROVED
from loader.serve.vllm.stages import Stage
from tests.engines.sources import UnavailableError, sources_of


@pytest.fixture(params=PROVED)
def sources(request: pytest.FixtureRequest) -> Path:
    try:
        return sources_of(request.param) / "vllm"
    except UnavailableError as error:
        pytest.skip(str(error))


def test_layers_are_divided_as_stages_says(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = ast.parse((sources / "distributed/utils.py").read_text())
    (function,) = (
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "get_pp_indices"
    )
    envs = SimpleNamespace(VLLM_PP_LAYER_PARTITION=None)
    names: dict[str, Any] = {"envs": envs, "logger": logging.getLogger("vllm")}
    exec(ast.unparse(function), names)
    for count in range(1, 40):
        for stages in range(2, min(count, 9) + 1):
            for rank in range(stages):
                own = Stage(rank, rank + 1, stages).layers(count)
                assert (own.start, own.stop) == names["get_pp_indices"](count, rank, stages)
    envs.VLLM_PP_LAYER_PARTITION = "3,1,4"
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,1,4")
    for rank in range(3):
        own = Stage(rank, rank + 1, 3).layers(8)
        assert (own.start, own.stop) == names["get_pp_indices"](8, rank, 3)


@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_the_ends_hold_what_stages_says(sources: Path, model: str) -> None:
    """Mistral's is Llama's class, Qwen 3's model is Qwen 2's. With drafts nothing is cut."""
    text = " ".join((sources / f"model_executor/models/{model}.py").read_text().split())
    embedding = (
        "if ( get_pp_group().is_first_rank or (config.tie_word_embeddings and "
        "get_pp_group().is_last_rank) or spec_decode_needs_target_embed(vllm_config) ): "
        "self.embed_tokens ="
    )
    assert embedding in text
    for held in ("self.norm = RMSNorm(", "self.lm_head = ParallelLMHead("):
        before = text[: text.index(held)]
        assert before.rindex("if get_pp_group().is_last_rank:") > before.rindex("def ")
