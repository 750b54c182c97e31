"""Shards that are read at the origin: what a run had written when it ended, the next one keeps."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from loader import boot
from loader.config.settings import Settings
from loader.errors import FetchError
from tests.models import tiny_llama
from tests.origin import FaultyHandler, FaultyOrigin, status
from tests.weights.formats.conftest import assert_same, tensors_of
from tests.weights.formats.test_bounds import save_alone

SHARD = "__0_0.distcp"
BLOCK_BYTES = 1 << 18  # what small reads are rounded up to; a matrix is more, and read by itself
PREPARE = """
import json, sys
from loader import boot
from loader.config.settings import Settings

boot.prepare(Settings.load(json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("larger")
    return tiny_llama(folder, hidden_size=512, intermediate_size=1536, num_hidden_layers=3)


@pytest.fixture
def config(base: Path, configure: Any, origin: FaultyOrigin, tmp_path: Path) -> dict[str, Any]:
    """What asks for the weights alone of a model of 37 MB in one shard."""
    home = tmp_path / "case/rank-0/checkpoint-10"
    home.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(base / name, home)
    save_alone({"model": state_of(base)}, home)
    found: dict[str, Any] = configure(tmp_path / "case", weights_only_fetch=True)
    return found


def state_of(base: Path) -> dict[str, torch.Tensor]:
    model: Any = LlamaForCausalLM.from_pretrained(base)
    return dict(model.state_dict())


def watch_tensors(origin: FaultyOrigin, number: int, then: Callable[[FaultyHandler], bool]) -> None:
    """Let the *number*-th tensor that is asked for meet *then*."""
    left = number

    def fault(handler: FaultyHandler) -> bool:
        nonlocal left
        with origin.lock:
            left -= size_of(handler.headers["Range"]) > BLOCK_BYTES
            due = left == 0
        return then(handler) if due else False

    origin.fail(SHARD, *[fault] * 10_000)


def size_of(span: str) -> int:
    first, _, last = span.removeprefix("bytes=").partition("-")
    return int(last) - int(first) + 1


def tensors_asked_for(origin: FaultyOrigin) -> list[str]:
    """Return the ranges of tensors since the last call."""
    found = [span for span in origin.ranges_of(SHARD) if span and size_of(span) > BLOCK_BYTES]
    origin.requests.clear()
    return found


def partial_folders(settings: Settings) -> list[Path]:
    return list((settings.training.download_folder / ".podloader/models").glob(".*.partial"))


def test_a_killed_run_is_gone_on_with(
    config: dict[str, Any], base: Path, origin: FaultyOrigin
) -> None:
    watch_tensors(origin, 18, lambda _: process.kill() or True)  # type: ignore[func-returns-value]
    process = subprocess.Popen([sys.executable, "-c", PREPARE, json.dumps(config)])
    assert process.wait() == -9
    origin.faults.clear()
    first = tensors_asked_for(origin)
    settings = Settings.load(config)
    assert len(partial_folders(settings)) == 1
    ready = boot.prepare(settings)
    second = tensors_asked_for(origin)
    assert_same(tensors_of(ready.path), state_of(base))
    assert not partial_folders(settings)
    assert not list(ready.path.glob("*.jsonl"))
    assert len(set(first) | set(second)) == 23  # seven matrices of each layer, two outside
    assert len(first) >= 18
    assert len(set(first) & set(second)) <= 8  # those under way, one of each thread


def fail_at(origin: FaultyOrigin, config: dict[str, Any], number: int) -> Path:
    """Let a run fail at the *number*-th tensor; return what it left."""
    watch_tensors(origin, number, status(404))
    settings = Settings.load(config)
    with pytest.raises(FetchError):
        boot.prepare(settings)
    origin.faults.clear()
    (left,) = partial_folders(settings)
    return left


def test_what_rotted_meanwhile_is_asked_for_again(
    config: dict[str, Any], base: Path, origin: FaultyOrigin
) -> None:
    left = fail_at(origin, config, 18)
    first = tensors_asked_for(origin)
    journal = left / "written.jsonl"
    noted = [json.loads(line) for line in journal.read_text().splitlines()]
    large = [line for line in noted if line[2] > BLOCK_BYTES]
    assert len(large) >= 8
    damage(left, str(large[3][0]))
    with journal.open("a") as file:
        file.write('["model.layers.0.mlp')  # its writer ended in the middle of a line
    ready = boot.prepare(Settings.load(config))
    assert_same(tensors_of(ready.path), state_of(base))
    second = tensors_asked_for(origin)
    assert len(second) == 23 - len(large) + 1
    assert set(first) & set(second)


def damage(folder: Path, tensor: str) -> None:
    """Turn a byte of *tensor* over, in files that are not whole yet."""
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length)).get(tensor)
            if entry:
                place = 8 + length + entry["data_offsets"][0]
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 1]))


def test_another_version_begins_anew(
    config: dict[str, Any], base: Path, origin: FaultyOrigin, tmp_path: Path
) -> None:
    left = fail_at(origin, config, 18)
    tensors_asked_for(origin)
    changed = {name: tensor + 1 for name, tensor in state_of(base).items()}
    save_alone({"model": changed}, tmp_path / "changed")
    for path in (tmp_path / "changed").iterdir():
        (place,) = origin.root.rglob(path.name)
        shutil.copyfile(path, place)
    settings = Settings.load(config)
    ready = boot.prepare(settings)
    assert_same(tensors_of(ready.path), changed)
    assert len(tensors_asked_for(origin)) == 23
    assert not left.exists()
    assert not partial_folders(settings)


def test_what_another_process_is_writing_is_left_to_it(
    config: dict[str, Any], base: Path, origin: FaultyOrigin
) -> None:
    """The other run is held in the middle; this one writes all of it for itself."""
    process: list[subprocess.Popen[bytes]] = []
    seen: list[dict[str, torch.Tensor]] = []

    def go_ahead(_: FaultyHandler) -> bool:
        if process and not seen:
            seen.append(tensors_of(boot.prepare(Settings.load(config)).path))
        return False

    watch_tensors(origin, 10, go_ahead)
    process.append(subprocess.Popen([sys.executable, "-c", PREPARE, json.dumps(config)]))
    assert process[0].wait() == 0
    assert_same(seen[0], state_of(base))
    settings = Settings.load(config)
    assert_same(tensors_of(boot.prepare(settings).path), state_of(base))
    assert not partial_folders(settings)
