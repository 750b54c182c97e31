"""A base that is fetched while its adapter is merged into it, or proved not to fit before."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loader import boot
from loader.adapters.merge import WeightedAdapter, merge
from loader.config.settings import Settings
from loader.errors import AdapterError, ChangedError, FetchError, FormatError
from loader.timeline import Timeline
from loader.weights.header import read_header
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import Fault, FaultyHandler, FaultyOrigin, act, status
from tests.test_boot import Job

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    base = tiny_llama(root / "base", max_shard_size="300KB", dtype=torch.bfloat16)
    return base, train_or_draw_lora(base, root / "adapter")


@pytest.fixture
def job(origin: FaultyOrigin, tmp_path: Path, models: tuple[Path, Path]) -> Job:
    job = Job(origin, tmp_path)
    job.put(models[0], "checkpoint-5", job="basejob")
    job.put(models[1], "checkpoint-10")
    return job


def settings_of(job: Job, **own: Any) -> Settings:
    base = {"base_model": "checkpoint:basejob/rank-0/checkpoint-5/"}
    return job.settings("rank-0/", jobs=("job1", "basejob"), **base, **own)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}


def test_merged_while_it_is_fetched(job: Job, models: tuple[Path, Path], tmp_path: Path) -> None:
    """The last file is held back until the merge of the first has begun to be written."""
    base, adapter = models
    last = sorted(path.name for path in base.glob("*-of-*.safetensors"))[-1]
    cache = job.root / ".podloader/models"
    first = sorted(path.name for path in base.glob("*-of-*.safetensors"))[0]
    seen: list[bool] = []

    def written() -> bool:
        expected = (tmp_path / "expected" / first).read_bytes()
        return any(p.read_bytes() == expected for p in cache.glob(f".*.partial/.*.partial/{first}"))

    def wait() -> None:
        end = time.monotonic() + 60
        while not (found := written()) and time.monotonic() < end:
            time.sleep(0.02)
        seen.append(found)

    merge(base, [WeightedAdapter(adapter)], tmp_path / "expected")
    # Of the last file, its size and its header are asked for before; the download comes third.
    nothing: Fault = act(lambda: None)
    job.origin.fail(last, nothing, nothing, nothing, act(wait))
    timeline = Timeline()
    ready = boot.prepare(settings_of(job), timeline=timeline)
    assert seen == [True]
    assert weights(ready.path).keys() == weights(base).keys()
    for path in (tmp_path / "expected").glob("*.safetensors*"):
        assert (ready.path / path.name).read_bytes() == path.read_bytes()
    assert ready.path.name.startswith("merge-")
    assert (ready.tokenizer, ready.provenance["name"]) == (ready.path, "job1")
    assert {stage.name for stage in timeline.stages} >= {"fit", "merge", "download"}
    assert [p.name for p in cache.iterdir()] == [ready.path.name]


def test_a_second_start_finds_the_first_ones(job: Job) -> None:
    ready = boot.prepare(settings_of(job))
    made = (ready.path / "podloader.json").stat().st_mtime_ns
    again = boot.prepare(settings_of(job))
    assert again.path == ready.path
    assert (again.path / "podloader.json").stat().st_mtime_ns == made


def test_the_same_whichever_way(job: Job) -> None:
    """Where the base is here already, the merged model has the same name and the same bytes."""
    ready = boot.prepare(settings_of(job))
    kept = {p.name: p.read_bytes() for p in ready.path.glob("*.safetensors")}
    shutil.rmtree(ready.path)
    again = boot.prepare(settings_of(job))
    assert again.path == ready.path
    assert {p.name: p.read_bytes() for p in again.path.glob("*.safetensors")} == kept


@pytest.mark.parametrize("policy", ["auto", "attach"])
def test_an_adapter_that_does_not_fit_costs_no_download(
    job: Job, models: tuple[Path, Path], policy: str
) -> None:
    path = job.origin.folder("job1") / "checkpoint-10/adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, name: torch.ones(4, 77)}, path)
    with pytest.raises(AdapterError, match="does not fit its base"):
        boot.prepare(settings_of(job, adapter_policy=policy))
    shards = list(models[0].glob("*-of-*.safetensors"))
    asked = [span for path, span in job.origin.requests if "basejob" in path and "-of-" in path]
    assert len(asked) <= 3 * len(shards)
    assert not list((job.root / "basejob").rglob("*-of-*.safetensors"))
    assert not (job.root / ".podloader/models").exists()


def test_attached_over_a_base_that_is_fetched(job: Job) -> None:
    ready = boot.prepare(settings_of(job, adapter_policy="attach"))
    assert ready.path == job.root / "basejob/rank-0/checkpoint-5"
    assert [a.name for a in ready.adapters] == ["job1"]


def test_a_fetch_that_fails_ends_the_merge(job: Job, models: tuple[Path, Path]) -> None:
    last = sorted(path.name for path in models[0].glob("*-of-*.safetensors"))[-1]
    nothing: Fault = act(lambda: None)
    job.origin.fail(last, nothing, nothing, nothing, *[status(404)] * 20)
    with pytest.raises(FetchError):
        boot.prepare(settings_of(job))
    assert not list((job.root / ".podloader/models").glob("*"))
    job.origin.faults.clear()
    assert boot.prepare(settings_of(job)).path.is_dir()


def test_a_header_that_lies(job: Job) -> None:
    path = next((job.origin.folder("basejob") / "checkpoint-5").glob("*00002-of-*"))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(FormatError, match="lies about"):
        boot.prepare(settings_of(job))


def test_a_single_file_with_a_long_header(origin: FaultyOrigin, tmp_path: Path) -> None:
    """The header is longer than the first read, so that the second one is needed."""
    job = Job(origin, tmp_path)
    base = tiny_llama(tmp_path / "base", num_hidden_layers=2)
    tensors = load_file(base / "model.safetensors")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt", "note": "x" * 200_000})
    job.put(base, "checkpoint-5", job="basejob")
    job.put(train_or_draw_lora(base, tmp_path / "adapter"), "checkpoint-10")
    ready = boot.prepare(settings_of(job))
    assert json.loads((ready.path / "podloader.json").read_text())["kind"] == "merged"
    assert weights(ready.path).keys() == tensors.keys()


def put_to_be_merged(job: Job, tmp_path: Path) -> Path:
    """Publish a base and its adapter; return the base, what they make lies in ``expected``."""
    base = tiny_llama(tmp_path / "base", hidden_size=256, num_hidden_layers=3)
    adapter = train_or_draw_lora(base, tmp_path / "adapter")
    merge(base, [WeightedAdapter(adapter)], tmp_path / "expected")
    job.put(base, "checkpoint-5", job="basejob")
    job.put(adapter, "checkpoint-10")
    return base


def test_a_single_file_is_merged_tensor_by_tensor(origin: FaultyOrigin, tmp_path: Path) -> None:
    """The end of the only file is held back until a tensor from its middle has been merged."""
    job = Job(origin, tmp_path)
    base = put_to_be_merged(job, tmp_path)
    info = read_header(base / FILE).tensors["model.layers.0.self_attn.q_proj.weight"]
    expected = (tmp_path / "expected" / FILE).read_bytes()
    size = (base / FILE).stat().st_size
    cache = job.root / ".podloader/models"
    seen: list[bool] = []

    def is_merged() -> bool:
        for path in cache.glob(f".*.partial/.*.partial/{FILE}"):
            with path.open("rb") as file:
                file.seek(info.start)
                if file.read(info.size_bytes) == expected[info.start : info.end]:
                    return True
        return False

    def hold(handler: FaultyHandler) -> bool:
        if handler.headers["Range"].endswith(f"-{size - 1}"):
            end = time.monotonic() + 20
            while not (found := is_merged()) and time.monotonic() < end:
                time.sleep(0.02)
            seen.append(found)
        return False

    nothing: Fault = act(lambda: None)
    job.origin.fail(f"checkpoint-5/{FILE}", nothing, nothing, nothing, *[hold] * 1000)
    ready = boot.prepare(settings_of(job, range_size="64KiB", concurrency=4))
    assert seen[0]
    assert (ready.path / FILE).read_bytes() == expected


def test_a_base_that_changes_after_its_header_was_read(
    origin: FaultyOrigin, tmp_path: Path
) -> None:
    """What was planned by one header is not done with the bytes of another file."""
    job = Job(origin, tmp_path)
    base = tiny_llama(tmp_path / "base")
    job.put(train_or_draw_lora(base, tmp_path / "adapter"), "checkpoint-10")
    path = job.put(base, "checkpoint-5", job="basejob") / FILE
    other = tiny_llama(tmp_path / "other", num_hidden_layers=3) / FILE
    nothing: Fault = act(lambda: None)
    replaced = act(lambda: shutil.copyfile(other, path))
    job.origin.fail(f"checkpoint-5/{FILE}", nothing, nothing, replaced)
    with pytest.raises(ChangedError):
        boot.prepare(settings_of(job))
    assert not list((job.root / ".podloader/models").glob("*"))
    shutil.copyfile(base / FILE, path)
    assert boot.prepare(settings_of(job)).path.is_dir()


def test_a_file_that_another_run_began(origin: FaultyOrigin, tmp_path: Path) -> None:
    """What an earlier run left of the file counts as having come."""
    job = Job(origin, tmp_path)
    base = put_to_be_merged(job, tmp_path)
    size = (base / FILE).stat().st_size
    nothing: Fault = act(lambda: None)

    def refuse(handler: FaultyHandler) -> bool:
        at_end = handler.headers["Range"].endswith(f"-{size - 1}")
        return status(404)(handler) if at_end else False

    job.origin.fail(f"checkpoint-5/{FILE}", nothing, nothing, nothing, *[refuse] * 1000)
    settings = settings_of(job, range_size="64KiB", concurrency=4)
    with pytest.raises(FetchError):
        boot.prepare(settings)
    assert not list((job.root / ".podloader/models").glob("*"))
    job.origin.faults.clear()
    sent = job.origin.bytes_sent
    ready = boot.prepare(settings)
    assert job.origin.bytes_sent - sent < size
    assert (ready.path / FILE).read_bytes() == (tmp_path / "expected" / FILE).read_bytes()
