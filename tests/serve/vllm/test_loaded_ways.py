"""Every way to a model, loaded while it is on its way: vLLM has of it what files make, bit by bit.

The matrix of ``tests/prepare/test_matrix.py`` says which ways can be followed at all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import FaultyOrigin, serving, slow, write_listing
from tests.other_models import draw_whisper_lora, tiny_embedder, tiny_whisper
from tests.prepare.test_adapted import fp8
from tests.weights.formats.test_bounds import save_alone, write_zero

pytestmark = pytest.mark.engine
STREAMED = (
    "as it is",
    "tied",
    "whisper",
    "embedder",
    "dcp",
    "zero",
    "attached",
    "merged",
    "merged over a local base",
    "whisper merged",
    "dequantised and merged",
    "dcp of an adapter, merged",
)
FILES = ("attached over a local base",)


def publish(folder: Path, origin: FaultyOrigin) -> dict[str, dict[str, Any]]:
    """Lay the checkpoints of every way out; return the settings that ask for each."""
    base = tiny_llama(folder / "base", dtype=torch.bfloat16, max_shard_size="300KB")
    one = tiny_llama(folder / "one", dtype=torch.bfloat16)
    quantised = fp8(one, folder / "fp8")
    tied = tiny_llama(folder / "tied", tie_word_embeddings=True)
    whisper, bert = tiny_whisper(folder / "whisper"), tiny_embedder(folder / "bert")
    adapter = train_or_draw_lora(base, folder / "adapter", dtype=torch.bfloat16)
    heard = draw_whisper_lora(whisper, folder / "heard")
    for model in (base, tied, whisper, bert, quantised, adapter, heard):
        shutil.copytree(model, origin.folder() / model.name)
    add_projection(origin.folder() / "bert")
    tensors = load_file(one / "model.safetensors")
    small = [path for path in one.iterdir() if path.suffix != ".safetensors"]
    for form in ("dcp", "zero"):
        (origin.folder() / form).mkdir()
        for path in small:
            shutil.copy(path, origin.folder() / form)
    save_alone({"model": tensors}, origin.folder() / "dcp/pytorch_model_fsdp_0")
    write_zero(origin.folder() / "zero/global_step1", tensors, moments=False)
    (origin.folder() / "zero/latest").write_text("global_step1")
    saved = load_file(adapter / "adapter_model.safetensors")
    trained = {n.replace(".weight", ".default.weight"): tensor for n, tensor in saved.items()}
    save_alone({"model": trained}, origin.folder() / "trained")
    shutil.copy(adapter / "adapter_config.json", origin.folder() / "trained")
    for weights in (".safetensors", ".distcp", ".pt"):
        origin.fail(weights, *[slow(0.02)] * 500)

    def over(name: str, base: str = "base", policy: str = "merge", **own: Any) -> dict[str, Any]:
        named = base if "/" in base else f"checkpoint:job1/rank-0/{base}/"
        return {"path": name, "base_model": named, "adapter_policy": policy, **own}

    return {
        "as it is": {"path": "base"},
        "tied": {"path": "tied"},
        "whisper": {"path": "whisper"},
        "embedder": {"path": "bert"},
        "dcp": {"path": "dcp"},
        "zero": {"path": "zero"},
        "attached": over("adapter", policy="attach"),
        "merged": over("adapter"),
        "merged over a local base": over("adapter", str(base)),
        "whisper merged": over("heard", "whisper"),
        "dequantised and merged": over("adapter", "fp8", dequantise=True),
        "dcp of an adapter, merged": over("trained"),
        "attached over a local base": over("adapter", str(base), "attach"),
    }


def add_projection(folder: Path) -> None:
    """Put behind the embedder in *folder* what sentence-transformers calls a Dense module."""
    modules = json.loads((folder / "modules.json").read_text())
    kind = "sentence_transformers.models.Dense"
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": kind})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    about: dict[str, Any] = {"in_features": 64, "out_features": 32, "bias": True}
    about["activation_function"] = "torch.nn.modules.linear.Identity"
    (folder / "2_Dense/config.json").write_text(json.dumps(about))
    tensors = {"linear.weight": torch.randn(32, 64), "linear.bias": torch.randn(32)}
    save_file(tensors, folder / "2_Dense/model.safetensors")


def document(folder: Path, listing: Path, way: dict[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in way.items() if name != "path"}
    references = [{"training_job_id": "job1", "paths": [f"rank-0/{way['path']}/"]}]
    return {
        "training_checkpoints": {
            "download_folder": str(folder),
            "artifact_references": references,
        },
        "model_metadata": {"podloader": {"artifacts": [str(listing)], "canary": False} | own},
    }


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What vLLM makes of each model both ways, in a process of its own."""
    folder = tmp_path_factory.mktemp("ways")
    with serving(folder / "origin") as origin:
        ways = publish(folder, origin)
        listing = write_listing(origin, folder / "job1.json")
        cases = {
            way: document(folder / f"down {number}", listing, settings)
            for number, (way, settings) in enumerate(ways.items())
        }
        (folder / "cases.json").write_text(json.dumps(cases))
        done = subprocess.run(
            [sys.executable, "-m", "tests.serve.vllm.loaded_ways", str(folder / "cases.json")],
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"},
        )
        assert not done.returncode, done.stderr[-5000:]
        yield json.loads(done.stdout)


@pytest.mark.parametrize("way", STREAMED)
def test_what_was_followed_is_what_files_are(loaded: dict[str, Any], way: str) -> None:
    assert loaded[way]["from"] == "stream"
    assert loaded[way]["files"]
    assert loaded[way]["arriving"] == loaded[way]["files"]


@pytest.mark.parametrize("way", FILES)
def test_what_is_here_is_not_followed(loaded: dict[str, Any], way: str) -> None:
    assert loaded[way]["from"] == "files"


def test_a_projection_is_in_what_was_followed(loaded: dict[str, Any]) -> None:
    assert [name for name in loaded["embedder"]["arriving"] if "projector" in name]


def test_adapters_are_in_what_was_merged(loaded: dict[str, Any]) -> None:
    plain, merged = loaded["as it is"]["arriving"], loaded["merged"]["arriving"]
    changed = {name for name in plain if merged[name] != plain[name]}
    assert changed
    assert all("qkv_proj" in name for name in changed)
