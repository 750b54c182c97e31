"""A model over several nodes by pipeline stages: each fetches and keeps its own tensors alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from loader import boot
from loader.arriving.origin_files import BLOCK_BYTES, RemoteFile
from loader.cli.tables import show_plan
from loader.config.settings import Settings
from loader.errors import CheckpointError, LoaderError
from loader.fetch.progress import LogProgress
from loader.prepare.remote import inspect_source
from loader.types import Kind, ReadyModel
from loader.weights.inspect import SHARE
from tests.models import tiny_llama
from tests.origin import FaultyOrigin, serving, write_listing
from tests.weights.formats.test_bounds import save_alone

_SMALL_BYTES = 120_000  # configs and tokenizers
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyOrigin]:
    with serving(tmp_path_factory.mktemp("origin")) as found:
        for tied in (True, False):
            model = tiny_llama(
                tmp_path_factory.mktemp("base") / "model",
                hidden_size=512,
                intermediate_size=1024,
                num_hidden_layers=5,
                tie_word_embeddings=tied,
                max_shard_size="20MB" if tied else "50GB",
            )
            shutil.copytree(model, found.folder("tied" if tied else "untied") / "model")
        yield found


def _settings(origin: FaultyOrigin, folder: Path, job: str, **own: Any) -> Settings:
    folder.mkdir(parents=True, exist_ok=True)
    listing = write_listing(origin, folder / "listing.json", job)
    return Settings.load(
        {
            "training_checkpoints": {
                "download_folder": str(folder / "down"),
                "artifact_references": [{"training_job_id": job, "paths": ["rank-0/"]}],
            },
            "model_metadata": {"podloader": {"artifacts": str(listing)} | own},
        }
    )


def _node(rank: int, nodes: int = 2, **more: object) -> dict[str, object]:
    args = {"pipeline_parallel_size": nodes, "nnodes": nodes, "node_rank": rank}
    return {"engine_args": args | more, "range_size": "64KiB"}


def _tensors(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def _bytes(tensors: dict[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _prepare(settings: Settings, origin: FaultyOrigin) -> tuple[ReadyModel, int]:
    before = origin.bytes_sent
    ready = boot.prepare(settings, LogProgress())
    return ready, origin.bytes_sent - before


@pytest.mark.parametrize("job", ["tied", "untied"])
def test_two_nodes_fetch_the_model_once_and_a_tied_embedding_twice(
    origin: FaultyOrigin, tmp_path: Path, job: str
) -> None:
    whole = _tensors(origin.folder(job) / "model")
    shares, sent = [], 0
    for rank in (0, 1):
        settings = _settings(origin, tmp_path / str(rank), job, **_node(rank))
        ready, count = _prepare(settings, origin)
        tensors = _tensors(ready.path)
        assert all(tensors[name].equal(whole[name]) for name in tensors)
        assert (ready.path / "config.json").read_bytes() == (
            origin.folder(job) / "model" / "config.json"
        ).read_bytes()
        assert ready.provenance["name"] == "model"
        assert not list((tmp_path / str(rank) / "down" / job).rglob("*.safetensors"))
        shares.append(tensors)
        sent += count
    first, second = shares
    assert first.keys() | second.keys() == whole.keys()
    assert first.keys() & second.keys() == ({_EMBEDDING} if job == "tied" else set())
    assert {name.split(".")[2] for name in first if ".layers." in name} == {"0", "1", "2"}
    assert {name.split(".")[2] for name in second if ".layers." in name} == {"3", "4"}
    assert _EMBEDDING in first
    assert "model.norm.weight" in second
    assert (_HEAD in second) is (job == "untied")
    needed = _bytes(first) + _bytes(second)
    # Headers and tensors that are smaller than a block are read in blocks.
    small = [t for share in shares for t in share.values() if t.nbytes < BLOCK_BYTES]
    slack = BLOCK_BYTES * (len(small) + 8) + 2 * _SMALL_BYTES
    assert slack < 0.2 * needed
    assert needed == _bytes(whole) + (whole[_EMBEDDING].nbytes if job == "tied" else 0)
    assert needed <= sent <= needed + slack


def test_a_share_is_not_taken_for_a_model(origin: FaultyOrigin, tmp_path: Path) -> None:
    settings = _settings(origin, tmp_path, "untied", **_node(1))
    ready, _ = _prepare(settings, origin)
    (found,) = inspect_source(str(ready.path), Settings.without_config())
    assert found.kind is Kind.UNKNOWN
    assert "pipeline stage 2 of 2: layers 3 to 4 of 5" in str(found.detail["lacks"])
    other = _settings(origin, tmp_path / "other", "untied", artifacts=[f"file://{ready.path}"])
    with pytest.raises(LoaderError):
        boot.prepare(other, LogProgress())
    again, sent = _prepare(settings, origin)
    assert again.path == ready.path
    assert sent < _SMALL_BYTES


def test_another_stage_and_all_of_it_are_other_folders(
    origin: FaultyOrigin, tmp_path: Path
) -> None:
    paths = set()
    for own in (_node(0), _node(1), _node(1, 3), {}):
        ready, _ = _prepare(_settings(origin, tmp_path, "untied", **own), origin)
        paths.add(ready.path)
    assert len(paths) == 4
    whole = _tensors(origin.folder("untied") / "model")
    assert _tensors(ready.path).keys() == whole.keys()
    there, sent = _prepare(_settings(origin, tmp_path, "untied", **_node(0)), origin)
    assert sent < _SMALL_BYTES
    assert not (there.path / SHARE).exists()  # all of it is here


@pytest.mark.parametrize("rank", [0, 1])
def test_a_plan_shows_it_as_it_then_comes(
    origin: FaultyOrigin, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(origin, tmp_path, "untied", **_node(rank))
    found = boot.look_ahead(settings)
    ready, _ = _prepare(settings, origin)
    assert found.share == ready.provenance["share"]
    assert found.share_bytes == _bytes(_tensors(ready.path))
    lines: list[str] = []
    monkeypatch.setattr("loader.cli.tables.show", lines.append)
    show_plan(found, tmp_path, 0)
    assert any(f"pipeline stage {rank + 1} of 2" in line for line in lines)
    whole = boot.look_ahead(_settings(origin, tmp_path / "whole", "untied"))
    assert whole.share == ""
    (disk,) = (room for room in found.room if room.what == "disk")
    (all_disk,) = (room for room in whole.room if room.what == "disk")
    assert disk.needed_bytes < 0.8 * all_disk.needed_bytes


def test_a_partition_that_is_given_is_kept_to(
    origin: FaultyOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,4")
    ready, _ = _prepare(_settings(origin, tmp_path, "untied", **_node(0)), origin)
    layers = {name.split(".")[2] for name in _tensors(ready.path) if ".layers." in name}
    assert layers == {"0"}


def test_a_model_of_another_kind_is_taken_whole(origin: FaultyOrigin, tmp_path: Path) -> None:
    model = origin.folder("strange") / "model"
    shutil.copytree(origin.folder("untied") / "model", model)
    config = (model / "config.json").read_text().replace("LlamaForCausalLM", "OddForCausalLM")
    (model / "config.json").write_text(config)
    ready, _ = _prepare(_settings(origin, tmp_path, "strange", **_node(0)), origin)
    assert _tensors(ready.path).keys() == _tensors(model).keys()


def test_a_start_that_was_killed_goes_on(origin: FaultyOrigin, tmp_path: Path) -> None:
    settings = _settings(origin, tmp_path, "untied", **_node(0))

    class Stop(LogProgress):
        def advance(self, count_bytes: int, path: str) -> None:
            raise CheckpointError("stopped")

    with pytest.raises(CheckpointError, match="stopped"):
        boot.prepare(settings, Stop())
    ready, _ = _prepare(settings, origin)
    whole = _tensors(origin.folder("untied") / "model")
    assert all(tensor.equal(whole[name]) for name, tensor in _tensors(ready.path).items())


def test_of_a_sharded_checkpoint_a_node_reads_its_stage_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_remote(*given: Any, **named: Any) -> RemoteFile:
        return RemoteFile(*given, **named | {"block_bytes": 4096})

    monkeypatch.setattr("loader.arriving.delivery.RemoteFile", open_remote)
    model = tiny_llama(tmp_path / "model", hidden_size=512, num_hidden_layers=4)
    whole = _tensors(model)
    with serving(tmp_path / "origin") as origin:
        place = origin.folder("dcp") / "checkpoint-1"
        shutil.copytree(model, place, ignore=shutil.ignore_patterns("*.safetensors"))
        save_alone({"model": whole, "optimizer": {"a": torch.ones(1 << 20)}}, place)
        ready, sent = _prepare(_settings(origin, tmp_path / "down", "dcp", **_node(1)), origin)
    tensors = _tensors(ready.path)
    assert {name.split(".")[2] for name in tensors if ".layers." in name} == {"2", "3"}
    assert all(tensor.equal(whole[name]) for name, tensor in tensors.items())
    assert sent < 0.8 * _bytes(whole)
