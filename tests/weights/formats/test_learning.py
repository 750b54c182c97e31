"""A model's names are learned in a process of its own, and are the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from loader.errors import UnsupportedError
from loader.weights.formats import learning
from loader.weights.formats.expected import read_model_names
from tests.models import tiny_llama
from tests.weights.formats.conftest import assert_same, tensors_of

# Tied embeddings, buffers that old checkpoints held, and an encoder beside a decoder.
MODELS: dict[str, dict[str, object]] = {
    "gpt2": {"n_layer": 1, "n_embd": 32, "n_head": 2, "architectures": ["GPT2LMHeadModel"]},
    "t5": {
        "d_model": 32,
        "num_layers": 1,
        "num_heads": 2,
        "architectures": ["T5ForConditionalGeneration"],
    },
    "whisper": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "architectures": ["WhisperForConditionalGeneration"],
    },
}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here transformers is imported, and nothing would have to be learned elsewhere."""
    monkeypatch.setattr(learning, "is_at_hand", lambda: False)
    before = psutil.Process().children()
    yield
    assert set(psutil.Process().children()) <= set(before)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("model_type", MODELS)
def test_the_same_names_in_the_same_order(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type, **MODELS[model_type]).save_pretrained(tmp_path)
    here = read_model_names(tmp_path)
    with learning.learning_names() as learn:
        there = learn(tmp_path)
    assert there == here
    assert list(there.shapes) == list(here.shapes)


@pytest.mark.usefixtures("elsewhere")
def test_what_cannot_be_learned_there_is_told_as_here(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing-like-this"}')
    with (
        learning.learning_names() as learn,
        pytest.raises(UnsupportedError, match="transformers makes no model"),
    ):
        learn(tmp_path)


@pytest.mark.usefixtures("elsewhere")
def test_the_process_ends_with_the_block() -> None:
    """Whether it was asked or not; ``elsewhere`` looks for it."""
    before = psutil.Process().children()
    with learning.learning_names():
        assert len(psutil.Process().children()) == len(before) + 1


def test_the_command_imports_no_transformers(tmp_path: Path) -> None:
    """Nor does it wait for what transformers imports besides."""
    whole = tiny_llama(tmp_path / "whole", max_shard_size="300KB")
    folders = [tmp_path / f"case/rank-{rank}/checkpoint-10" for rank in (0, 1)]
    for folder in folders:
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(whole.iterdir())):
        path.rename(folders[number % 2] / path.name)
    out = tmp_path / "out"
    arguments = ["consolidate", *map(str, folders), "--output", str(out), "--json"]
    code = (
        "import sys\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "from loader.cli import main\n"
        "main()\n"
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["kind"] == "full"
    shards = [load_file(p) for f in folders for p in f.glob("*.safetensors")]
    assert_same(tensors_of(out), {k: v for shard in shards for k, v in shard.items()})


@pytest.mark.usefixtures("elsewhere")
def test_it_is_not_waited_for_without_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(learning, "_LIMIT_S", 0.5)
    monkeypatch.setattr(learning, "_MAIN", "import sys, time; sys.stdin.read(); time.sleep(600)")
    with (
        learning.learning_names() as learn,
        pytest.raises(UnsupportedError, match="in time") as caught,
    ):
        learn(tmp_path)
    assert caught.value.where.endswith("config.json")
