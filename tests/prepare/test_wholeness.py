"""A model that lacks a tensor goes to no engine, wherever it comes from."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loader import boot
from loader.errors import CheckpointError
from loader.weights.formats.learning import GapLearner
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import FaultyOrigin
from tests.prepare.test_adapted import FILE, behind_url, over_checkpoint
from tests.test_boot import Job
from tests.test_cli import run

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "adapter"
    return train_or_draw_lora(base, folder, target_modules=["v_proj", "down_proj"])


@pytest.fixture(scope="module")
def broken(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the base without the queries of one layer."""
    folder = tmp_path_factory.mktemp("models") / "broken"
    shutil.copytree(base, folder)
    tensors = load_file(folder / FILE)
    del tensors[Q]
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


@pytest.fixture
def job(origin: FaultyOrigin, tmp_path: Path) -> Job:
    return Job(origin, tmp_path)


def in_folder(job: Job, base: Path, **own: Any) -> Any:
    return job.settings("rank-0/", **{"base_model": str(base)} | own)


def named_checkpoint(job: Job, base: Path, **own: Any) -> Any:
    return over_checkpoint(job, base, **own)


def refused(error: pytest.ExceptionInfo[CheckpointError]) -> None:
    assert error.value.what == "a model that lacks tensors, which an engine would make up"
    assert error.value.problems == (f"missing: {Q}",)
    assert "1 missing" in error.value.got


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_full_checkpoint(job: Job, broken: Path, is_streamed: bool) -> None:
    job.put(broken, "checkpoint-5")
    announce = (lambda *_: None) if is_streamed else None
    with pytest.raises(CheckpointError) as error:
        boot.prepare(job.settings("rank-0/"), announce=announce)
    refused(error)
    assert error.value.where == "job1/rank-0/checkpoint-5"


@pytest.mark.parametrize("policy", ["attach", "merge"])
@pytest.mark.parametrize("place", [in_folder, behind_url, named_checkpoint])
def test_a_base(
    job: Job, broken: Path, adapter: Path, place: Callable[..., Any], policy: str
) -> None:
    job.put(adapter, "checkpoint-10")
    with pytest.raises(CheckpointError) as error:
        boot.prepare(place(job, broken, adapter_policy=policy))
    refused(error)
    models = job.root / ".podloader" / "models"
    assert not [*models.glob("merge-*"), *models.glob(".merging*")]


def test_a_pickled_checkpoint(job: Job, broken: Path) -> None:
    place = job.put(broken, "checkpoint-5")
    torch.save(load_file(place / FILE), place / "pytorch_model.bin")
    (place / FILE).unlink()
    with pytest.raises(CheckpointError) as error:
        boot.prepare(job.settings("rank-0/", allow_pickle=True))
    refused(error)


def test_a_merge_by_hand(broken: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("merge", "--base", broken, "--adapter", adapter, "--output", out)
    assert done.returncode == CheckpointError.exit_code
    assert f"missing: {Q}" in done.stderr
    assert not [*tmp_path.glob("*out*")]


def test_a_whole_one_is_looked_at_once(
    job: Job, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = job.put(base, "checkpoint-5")
    boot.prepare(job.settings("rank-0/"))
    again = "asked again"
    monkeypatch.setattr(GapLearner, "learn", lambda *_, **__: pytest.fail(again))
    boot.prepare(job.settings("rank-0/"))
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        boot.prepare(job.settings("rank-0/"))


def test_tensors_without_a_use_are_told(
    job: Job, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = job.put(base, "checkpoint-5")
    more = {"model.layers.0.extra.weight": torch.ones(2)}
    save_file(load_file(place / FILE) | more, place / FILE, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "podloader"):
        boot.prepare(job.settings("rank-0/"))
    assert "no use for these tensors" in caplog.text
    assert "model.layers.0.extra.weight" in caplog.text
