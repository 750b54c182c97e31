"""Laid files at both places, behind symlinks, beside sums, and taken by several starts."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_saver import save

from loader import boot
from loader.config.settings import Settings
from loader.errors import CheckpointError, DiskError, LoaderError, ResolveError
from loader.fetch import adoption, scan
from loader.fetch.sum_manifests import sum_folder
from loader.types import Snapshot
from tests.fetch.test_adoption import (
    WEIGHTS,
    at_origin,
    end_urls,
    files_settle_soon,
    job,
    lay,
    spoil_sparse,
    spoil_with_written_zeros,
    without_origin,
)
from tests.models import tiny_llama
from tests.origin import status
from tests.test_boot import Job

__all__ = ["files_settle_soon", "job"]
NAMES = [f"job1/rank-0/checkpoint-1/{name}" for name in ("config.json", WEIGHTS)]


def reused(snapshot: Snapshot) -> dict[str, bool]:
    return {file.path: file.reused for file in snapshot.files}


def all_taken(snapshot: Snapshot) -> bool:
    return reused(snapshot) == dict.fromkeys(NAMES, True)


def test_every_start_takes_what_lies_flat(job: Job) -> None:
    path = lay(job, flat=True)
    for _ in range(3):
        assert all_taken(boot.fetch_files(without_origin(job)))
        assert (job.root / NAMES[1]).resolve() == path


@pytest.mark.parametrize("flat", [False, True])
def test_with_a_listing_and_without_one_by_turns(
    job: Job, flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(job, flat=flat)
    listed = job.settings("rank-0/checkpoint-1/")
    for settings in (without_origin(job), listed, without_origin(job), listed):
        assert all_taken(boot.fetch_files(settings))
    monkeypatch.setattr(adoption, "scan_file", None)
    for settings in (without_origin(job), listed):
        assert all_taken(boot.fetch_files(settings))


def test_what_a_fetch_brought_is_not_brought_again_without_a_listing(job: Job) -> None:
    assert not all_taken(boot.fetch_files(job.settings("rank-0/checkpoint-1/")))
    assert all_taken(boot.fetch_files(without_origin(job)))


def test_another_checkpoint_is_laid_flat_later(job: Job) -> None:
    path = lay(job, flat=True)
    boot.fetch_files(without_origin(job))
    shutil.copytree(path.parent, path.parent.with_name("checkpoint-2"))
    snapshot = boot.fetch_files(job.settings("rank-0/checkpoint-2/", artifacts=[]))
    assert set(reused(snapshot).values()) == {True}


def test_a_start_that_was_killed_while_it_took_files(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(job, flat=True)
    real = scan.scan_file

    def die(fd: int, size_bytes: int, *more: object) -> object:
        if size_bytes > 100:
            raise KeyboardInterrupt
        return real(fd, size_bytes, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(adoption, "scan_file", die)
    with pytest.raises(KeyboardInterrupt):
        boot.fetch_files(without_origin(job))
    monkeypatch.setattr(adoption, "scan_file", real)
    assert all_taken(boot.fetch_files(without_origin(job)))


def test_of_two_places_the_good_one_is_taken(job: Job) -> None:
    spoil_sparse(lay(job))
    good = lay(job, flat=True)
    assert all_taken(boot.fetch_files(job.settings("rank-0/checkpoint-1/")))
    assert (job.root / NAMES[1]).resolve() == good


@pytest.mark.parametrize("spoil", [spoil_with_written_zeros, Path.unlink])
def test_what_a_symlink_of_ours_led_to_is_spoilt(job: Job, spoil: object) -> None:
    path = lay(job, flat=True)
    boot.fetch_files(job.settings("rank-0/checkpoint-1/"))
    spoil(path)  # type: ignore[operator]
    snapshot = boot.fetch_files(job.settings("rank-0/checkpoint-1/"))
    assert reused(snapshot) == {NAMES[0]: True, NAMES[1]: False}
    assert (job.root / NAMES[1]).read_bytes() == at_origin(job).read_bytes()
    assert not (job.root / NAMES[1]).is_symlink()


def test_a_symlink_to_itself_is_named_and_fetched(job: Job) -> None:
    path = lay(job)
    (path.parent / "loop").symlink_to(".")
    path.unlink()
    path.symlink_to(WEIGHTS)
    assert not reused(boot.fetch_files(job.settings("rank-0/checkpoint-1/")))[NAMES[1]]
    assert all_taken(boot.fetch_files(without_origin(job)))  # the loop is not entered


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_symlinked_folders(job: Job, depth: int) -> None:
    folder = lay(job).parents[2 - depth]
    store = job.root / "store"
    folder.rename(store)
    folder.symlink_to(os.path.relpath(store, folder.parent))
    for _ in range(2):
        assert all_taken(boot.fetch_files(without_origin(job)))


def test_folders_outside_are_not_looked_into(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = lay(job).parent
    shutil.move(folder, tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    with pytest.raises(ResolveError):
        boot.fetch_files(without_origin(job))
    assert f"{folder} leads out of the download folder" in caplog.text


def test_a_folder_that_cannot_be_read(job: Job) -> None:
    job.root.mkdir()
    (job.root / "job1").symlink_to("job1")
    with pytest.raises(DiskError) as found:
        boot.fetch_files(without_origin(job))
    assert str(job.root / "job1") in str(found.value)


def test_local_and_an_origin_together(job: Job) -> None:
    path = lay(job)
    path.with_name("config.json").unlink()
    (path.parent / "mine.json").write_text("{}")
    settings = job.settings("rank-0/checkpoint-1/")
    both = job.settings("rank-0/checkpoint-1/", artifacts=["local", *settings.artifacts])
    mine = "job1/rank-0/checkpoint-1/mine.json"
    expected = {NAMES[0]: False, mine: True, NAMES[1]: True}
    assert reused(boot.fetch_files(both)) == expected


def test_sums_that_lie_beside_are_read_where_the_urls_have_ended(job: Job) -> None:
    sum_folder(at_origin(job).parent)
    path = lay(job)
    found = reused(boot.fetch_files(end_urls(job)))
    assert found == dict.fromkeys([*NAMES, "job1/rank-0/checkpoint-1/podloader.sums"], True)

    content = bytearray(path.read_bytes())
    content[2 << 20] ^= 1
    path.write_bytes(content)
    (job.root / ".podloader/files" / f"{NAMES[1]}.record").unlink()
    with pytest.raises(CheckpointError, match=r"not what .*podloader.sums says"):
        boot.fetch_files(end_urls(job))


def test_a_file_that_aria2_has_not_finished(job: Job) -> None:
    path = lay(job)
    spoil_with_written_zeros(path)
    control = path.with_name(f"{path.name}.aria2")
    control.write_bytes(b"\x00\x01")
    with pytest.raises(CheckpointError, match=r"not finished: .*\.aria2 lies beside it"):
        boot.fetch_files(without_origin(job))
    control.unlink()
    assert all_taken(boot.fetch_files(without_origin(job)))


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away takes root")
def test_what_another_user_owns_is_told_with_its_remedy(job: Job) -> None:
    os.chown(lay(job), 12345, 12345)
    with pytest.raises(CheckpointError, match=r"belongs to user 12345, .*\(chown\)"):
        boot.fetch_files(without_origin(job))


@pytest.mark.parametrize("code", [403, 404, 500])
def test_an_origin_that_refuses_one_file(job: Job, code: int) -> None:
    lay(job)
    job.origin.fail(WEIGHTS, *[status(code)] * 20)
    with pytest.raises(LoaderError) as found:
        boot.fetch_files(job.settings("rank-0/checkpoint-1/", retries=0))
    assert WEIGHTS in str(found.value)
    job.origin.faults.clear()
    assert all_taken(boot.fetch_files(job.settings("rank-0/checkpoint-1/")))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("flat", [False, True])
def test_shards_that_lie_there_are_consolidated_without_any_network(job: Job, flat: bool) -> None:
    model = tiny_llama(job.folder / "model")
    weights = load_file(model / "model.safetensors")
    place = job.root / ("rank-0" if flat else "job1/rank-0") / "checkpoint-7"
    shutil.copytree(model, place, ignore=shutil.ignore_patterns("*.safetensors"))
    save({"app": {"model": weights}}, checkpoint_id=place / "pytorch_model_fsdp_0", no_dist=True)
    save({"app": {"step": torch.ones(9)}}, checkpoint_id=place / "optimizer_0", no_dist=True)
    settings = job.settings("rank-0/checkpoint-7/", artifacts=[], weights_only_fetch=True)
    for _ in range(2):
        made = load_file(boot.prepare(settings).path / "model.safetensors")
        assert all(torch.equal(made[name], weights[name]) for name in made)
        assert len(made) >= len(weights) - 1  # the head may be tied
    assert not job.origin.requests


def test_a_name_that_is_no_text(job: Job) -> None:
    path = lay(job)
    Path(os.fsdecode(os.fsencode(path.parent) + b"/\xff.json")).write_text("{}")
    with pytest.raises(ResolveError, match="not valid Unicode"):
        boot.fetch_files(without_origin(job))


def test_several_starts_at_once(job: Job) -> None:
    lay(job, flat=True)
    taken: list[Snapshot] = []
    threads = [
        threading.Thread(target=lambda: taken.append(boot.fetch_files(without_origin(job))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(map(all_taken, taken)) == [True] * 3
    assert {path.name for path in job.root.iterdir()} == {".podloader", "job1", "rank-0"}


def test_many_files_whose_clock_is_ahead_are_waited_for_once(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lay(job)
    for i in range(40):
        (path.parent / f"{i}.json").write_text("{}")
    slept: list[float] = []
    real, now = time.sleep, time.time()
    monkeypatch.setattr(time, "time", lambda: now - 1000)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        real(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    boot.fetch_files(without_origin(job, concurrency=1))
    assert len(slept) <= 5  # 0.2 s, by 0.05


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.model"])
def test_ended_urls_and_one_file_that_is_a_byte_short(job: Job, name: str) -> None:
    at_origin(job, "tokenizer.model").write_bytes(b"no format that could tell")
    settings, path = end_urls(job), lay(job).with_name(name)
    listing = Path(settings.artifacts[0])
    told = json.loads(listing.read_text())
    for entry in told["checkpoint_artifacts"]:
        if entry["relative_file_name"].endswith(".model"):  # sizes are told of some
            entry["size_bytes"] = at_origin(job, "tokenizer.model").stat().st_size
    listing.write_text(json.dumps(told))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError) as found:
        boot.fetch_files(settings)
    (problem,) = found.value.problems
    assert problem.startswith(f"{path}: ")


def test_two_jobs(job: Job) -> None:
    lay(job)
    shutil.copytree(job.root / "job1", job.root / "job2")
    references = [
        {"training_job_id": name, "paths": ["rank-0/checkpoint-1/"]} for name in ("job1", "job2")
    ]
    checkpoints = {"download_folder": str(job.root), "artifact_references": references}
    settings = Settings.load({"training_checkpoints": checkpoints})
    found = reused(boot.fetch_files(settings))
    assert found == dict.fromkeys([*NAMES, *(n.replace("job1", "job2") for n in NAMES)], True)
    shutil.move(job.root / "job2/rank-0", job.root / "rank-0")  # whose ranks these are is not said
    with pytest.raises(LoaderError, match="no listing for a job") as lacking:
        boot.fetch_files(settings)
    assert lacking.value.expected == "job2"


def test_a_listing_of_local_urls(job: Job) -> None:
    path = lay(job)
    entries = [
        {"url": f"file://{p}", "relative_file_name": f"checkpoint-1/{p.name}", "node_rank": 0}
        for p in path.parent.iterdir()
    ]
    listing = job.folder / "local.json"
    listing.write_text(json.dumps({"job": {"id": "job1"}, "checkpoint_artifacts": entries}))
    job.root = job.folder / "elsewhere"
    settings = job.settings("rank-0/", artifacts=[str(listing)], allow_local_urls=True)
    snapshot = boot.fetch_files(settings)
    assert sorted(reused(snapshot)) == NAMES
