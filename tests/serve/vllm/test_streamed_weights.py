"""Models whose weights arrive while vLLM loads them: what it makes of them is what files make."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from loader.arriving.feed import Feed
from loader.arriving.standins import EnginePath
from loader.errors import ChangedError, EngineError
from loader.serve.vllm import streamed_weights
from loader.serve.vllm.streamed_weights import read_weights
from tests.filling import SlowFolder
from tests.models import tiny_llama
from tests.other_models import tiny_embedder, tiny_whisper
from tests.prepare.test_adapted import quantise
from tests.serve.vllm.loaded_weights import DRAFT, ORDERS, PLAIN

MODELS = ("llama", "tied", "own_head", "bert", "whisper", "int8", "mixtral")
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTISED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": INT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": INT8 | {"strategy": "token", "dynamic": True},
        }
    },
}


def in_eight_bits(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale.bfloat16()}


def tiny_mixtral(folder: Path) -> None:
    """Save a mixture of experts, whose tensors vLLM puts together."""
    shutil.copytree(folder.parent / "one", folder)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = MixtralConfig(**sizes, **heads, vocab_size=vocabulary, initializer_range=0.1)
    MixtralForCausalLM(config).bfloat16().save_pretrained(folder)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM makes of each model, in a process of its own."""
    folder = tmp_path_factory.mktemp("models")
    tiny_llama(folder / "llama", dtype=torch.bfloat16, max_shard_size="300KB")
    tiny_llama(folder / "tied", tie_word_embeddings=True)
    # The config says that it is tied, and there is a head of its own all the same.
    own = tiny_llama(folder / "own_head", tie_word_embeddings=True) / "model.safetensors"
    head = {"lm_head.weight": torch.randn(load_file(own)["model.embed_tokens.weight"].shape)}
    save_file(load_file(own) | head, own, {"format": "pt"})
    tiny_embedder(folder / "bert")
    tiny_whisper(folder / "whisper")
    one = tiny_llama(folder / "one", dtype=torch.bfloat16)
    quantise(one, folder / "int8", QUANTISED, in_eight_bits)
    tiny_mixtral(folder / "mixtral")
    command = [sys.executable, "-m", "tests.serve.vllm.loaded_weights"]
    done = subprocess.run(
        [*command, *(str(folder / name) for name in MODELS)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"},
    )
    assert not done.returncode, done.stderr[-5000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.engine
@pytest.mark.parametrize("order", [*ORDERS, DRAFT])
@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_buffers_are_those_of_files(
    loaded: dict[str, Any], name: str, order: str
) -> None:
    assert loaded[name][PLAIN]
    assert loaded[name][order] == loaded[name][PLAIN]


@pytest.mark.engine
def test_a_head_of_ones_own_is_seen(loaded: dict[str, Any]) -> None:
    assert "lm_head.weight" in loaded["own_head"]["shuffled"]
    assert "lm_head.weight" not in loaded["tied"]["shuffled"]


# Without an engine.


TENSORS = {
    "lm_head.weight": torch.full((3,), 0.5),
    **{f"model.layers.{n}.weight": torch.full((2000,), float(n)) for n in range(12)},
    "model.norm.weight": torch.zeros(0),
}


@pytest.fixture
def filling(tmp_path: Path) -> SlowFolder:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file(TENSORS, source / "model.safetensors")
    return SlowFolder(source, tmp_path / "filling")


@pytest.fixture
def taken(filling: SlowFolder, tmp_path: Path) -> Iterator[EnginePath]:
    found = EnginePath.take(tmp_path)
    found.stand_in(filling)
    yield found
    found.release()


@pytest.fixture
def feed(filling: SlowFolder, taken: EnginePath) -> Iterator[Feed]:
    made = Feed(filling, taken.feed)
    yield made
    made.close()


def own(*_: object) -> Iterator[tuple[str, torch.Tensor]]:
    yield "vllm", torch.zeros(1)


def read(folder: Path, **arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return read_weights(own, [str(folder / "model.safetensors")], False, **arguments)


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    from loader.serve.vllm import private

    def skips(name: str, local_expert_ids: set[int] | None) -> bool:
        return local_expert_ids is not None and ".layers.3." in name

    monkeypatch.setattr(private, "should_skip_weight", skips, raising=False)


@pytest.mark.usefixtures("no_vllm")
@pytest.mark.parametrize("small_bytes", [1 << 20, 1])
def test_tensors_come_layer_by_layer_as_far_as_they_are_here(
    feed: Feed,
    filling: SlowFolder,
    taken: EnginePath,
    monkeypatch: pytest.MonkeyPatch,
    small_bytes: int,
) -> None:
    monkeypatch.setattr(streamed_weights, "_SMALL_BYTES", small_bytes)
    filling.put(["model.layers.10.weight", "lm_head.weight", "model.layers.2.weight"])
    found = read(taken.path)
    names, values = [], {}
    rest = [name for name in reversed(TENSORS) if ".10." not in name and ".2." not in name]
    for name, tensor in found:
        names.append(name)
        values[name] = tensor
        if len(names) == 1:
            filling.put([name for name in rest if name != "lm_head.weight"])
            filling.end()
    assert names[0] == "lm_head.weight"
    assert names.index("model.layers.0.weight") < names.index("model.layers.1.weight")
    assert names.index("model.layers.2.weight") < names.index("model.layers.11.weight")
    assert names[-2:] == ["model.layers.11.weight", "model.norm.weight"]
    assert set(values) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert values[name].equal(tensor), name
    values["model.layers.2.weight"] += 1  # a model may write to what it is given
    assert values["model.layers.3.weight"].equal(TENSORS["model.layers.3.weight"])
    assert [feed.is_taken] == [True] or _soon(lambda: feed.is_taken)


def _soon(what: Any) -> bool:
    for _ in range(1000):
        if what():
            return True
        threading.Event().wait(0.01)
    return False


@pytest.mark.usefixtures("no_vllm")
def test_what_a_mapped_tensor_shares_a_page_with_may_still_come(
    feed: Feed, filling: SlowFolder, taken: EnginePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_weights, "_SMALL_BYTES", 1)
    filling.put(["model.layers.5.weight"])
    found = read(taken.path)
    _, first = next(found)
    first += 1
    filling.put([name for name in TENSORS if ".5." not in name])
    filling.end()
    values = dict(found)
    assert all(values[name].equal(TENSORS[name]) for name in values)
    assert first.equal(TENSORS["model.layers.5.weight"] + 1)
    assert len(values) == len(TENSORS) - 1


@pytest.mark.usefixtures("no_vllm")
def test_experts_of_other_ranks_are_not_waited_for(
    feed: Feed, filling: SlowFolder, taken: EnginePath
) -> None:
    filling.put([name for name in TENSORS if ".layers.3." not in name])
    names = {name for name, _ in read(taken.path, local_expert_ids={0})}
    assert names == {name for name in TENSORS if ".layers.3." not in name}
    assert _soon(lambda: feed.is_taken)


def test_a_folder_that_is_whole_is_read_by_vllm(tmp_path: Path, filling: SlowFolder) -> None:
    assert [name for name, _ in read(tmp_path / "source")] == ["vllm"]


def test_stand_ins_without_a_feed_are_no_weights(taken: EnginePath) -> None:
    with pytest.raises(EngineError, match="is gone"):
        list(read(taken.path))


@pytest.mark.usefixtures("no_vllm")
def test_the_sources_error_is_the_engines(
    feed: Feed, filling: SlowFolder, taken: EnginePath
) -> None:
    filling.end(ChangedError("it changed"))
    with pytest.raises(ChangedError):
        list(read(taken.path))
    assert not feed.broken


@pytest.mark.usefixtures("no_vllm")
@pytest.mark.parametrize("what", ["another head", "short file", "never comes", "torchao"])
def test_what_cannot_be_followed_is_told(
    feed: Feed, filling: SlowFolder, taken: EnginePath, what: str
) -> None:
    filling.put(list(TENSORS)[: 3 if what == "never comes" else None])
    filling.end()
    if what == "another head":
        save_file({"a": torch.zeros(3)}, taken.path / "model.safetensors")
    if what == "short file":
        os.truncate(filling.folder / "model.safetensors", 1000)
    more = {"safetensors_load_strategy": what} if what == "torchao" else {}
    with pytest.raises(EngineError, match="cannot be followed"):
        list(read(taken.path, **more))
    assert _soon(lambda: feed.broken)
    assert not feed.is_taken
