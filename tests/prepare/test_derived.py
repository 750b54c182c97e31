"""What is derived bears the digests of its inputs, and is published only where they have them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from awscrt.checksums import crc64nvme
from safetensors.torch import load_file

from loader import boot
from loader.adapters.merge import WeightedAdapter, merge
from loader.config.settings import Settings
from loader.errors import ChangedError, LoaderError
from loader.fetch.digests import Digests
from loader.prepare.inputs import UnprovedError
from loader.types import ReadyModel
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import FaultyOrigin
from tests.prepare.test_hub_base import prepare as prepare_over_hub
from tests.stores.hub import Hub
from tests.test_boot import Job

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    base = tiny_llama(root / "base", dtype=torch.bfloat16)
    return base, train_or_draw_lora(base, root / "adapter")


@pytest.fixture
def job(origin: FaultyOrigin, tmp_path: Path, models: tuple[Path, Path]) -> Job:
    job = Job(origin, tmp_path)
    job.put(models[1], "checkpoint-10")
    return job


@pytest.fixture
def base(models: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(models[0], tmp_path / "base"))


@pytest.fixture
def hub(base: Path) -> Iterator[Hub]:
    found = Hub(base)
    yield found
    found.shutdown()
    found.server_close()


def flip(path: Path, *, back: int = 1) -> None:
    """Turn a bit over, with nothing to be seen of it but ``ctime``."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-back] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def merged(job: Job, base: Path, **own: Any) -> ReadyModel:
    return boot.prepare(settings_of(job, base, **own))


def settings_of(job: Job, base: Path, **own: Any) -> Settings:
    return job.settings(
        "rank-0/checkpoint-10/", base_model=str(base), adapter_policy="merge", **own
    )


def models_in(job: Job) -> list[Path]:
    return sorted((job.root / ".podloader/models").glob("*e-????????????????"))


def is_right(path: Path, models: tuple[Path, Path], tmp_path: Path) -> bool:
    expected = tmp_path / "expected"
    if not expected.exists():
        merge(models[0], [WeightedAdapter(models[1])], expected)
    found, right = load_file(path / FILE), load_file(expected / FILE)
    return all(torch.equal(found[name], right[name]) for name in right)


@pytest.mark.parametrize("verify", ["sample", "size", "full"])
def test_a_base_of_the_hub_with_a_wrong_bit(
    job: Job, hub: Hub, models: tuple[Path, Path], tmp_path: Path, verify: str
) -> None:
    done = prepare_over_hub(job, hub, models[1], adapter_policy="attach")
    assert done.returncode == 0, done.stderr
    (cached,) = (tmp_path / "home").rglob(FILE)
    flip(cached.resolve())
    done = prepare_over_hub(job, hub, models[1], adapter_policy="merge", verify=verify)
    assert done.returncode == 0, done.stderr
    assert "is fetched again" in done.stderr
    assert cached.read_bytes() == (hub.folder / FILE).read_bytes()
    (made,) = models_in(job)
    assert is_right(made, models, tmp_path)
    stamp = (made / FILE).stat().st_mtime_ns
    done = prepare_over_hub(job, hub, models[1], adapter_policy="merge", verify="full")
    assert done.returncode == 0, done.stderr
    assert (made / FILE).stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "own",
    [
        {"adapter_policy": "merge"},
        {"adapter_policy": "merge", "verify": "full"},
        {"adapter_policy": "attach", "verify": "full"},
    ],
    ids=["merge", "merge-full", "attach-full"],
)
def test_a_new_file_of_the_hub_with_a_wrong_bit(
    job: Job, hub: Hub, models: tuple[Path, Path], tmp_path: Path, own: dict[str, Any]
) -> None:
    hub.flips = [FILE]
    done = prepare_over_hub(job, hub, models[1], **own)
    assert done.returncode == 0, done.stderr
    assert "is fetched again" in done.stderr
    (cached,) = (tmp_path / "home").rglob(FILE)
    assert cached.read_bytes() == (hub.folder / FILE).read_bytes()
    assert all(is_right(made, models, tmp_path) for made in models_in(job))


def test_a_hub_that_goes_on_sending_a_wrong_bit(
    job: Job, hub: Hub, models: tuple[Path, Path], tmp_path: Path
) -> None:
    hub.flips = [FILE] * 9
    for own in ({"verify": "full"}, {}):
        done = prepare_over_hub(job, hub, models[1], adapter_policy="merge", **own)
        assert done.returncode == 4, done.stderr
        assert "Traceback" not in done.stderr
        assert not models_in(job)
        assert not list((tmp_path / "home").rglob(FILE))


def test_a_local_base_is_known_by_its_bytes(
    job: Job, base: Path, models: tuple[Path, Path], tmp_path: Path
) -> None:
    first = merged(job, base)
    assert is_right(first.path, models, tmp_path)
    flip(base / FILE)
    second = merged(job, base)
    assert second.path != first.path
    assert not is_right(second.path, models, tmp_path)
    flip(base / FILE)
    os.utime(base / FILE)
    assert merged(job, base).path == first.path
    moved = base.rename(tmp_path / "moved")
    assert merged(job, moved).path == first.path
    (moved / "README.md").write_text("not of the model")
    (moved / "config.json").write_text((moved / "config.json").read_text() + " ")
    assert merged(job, moved).path not in (first.path, second.path)


@pytest.mark.parametrize("part", ["1_Pooling/config.json", "2_Dense/model.safetensors"])
def test_a_local_base_is_known_by_its_parts(job: Job, base: Path, part: str) -> None:
    (base / "modules.json").write_text("[]")
    (base / part).parent.mkdir()
    (base / part).write_text("{}")
    first = merged(job, base)
    (base / part).write_text("{ }")
    second = merged(job, base)
    assert (second.path / part).read_text() == "{ }"
    assert second.path != first.path


def test_a_local_base_is_read_once(job: Job, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time.sleep(0.1)  # what is younger may change without a trace
    first = merged(job, base)
    monkeypatch.setattr("loader.fetch.digests._digest", None)
    assert merged(job, base).path == first.path


def test_a_local_base_that_is_written_to_meanwhile(
    job: Job, base: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loader.prepare.adapted._merge", then(lambda: flip(base / FILE)))
    with pytest.raises(ChangedError, match="changed while"):
        merged(job, base)
    assert not models_in(job)
    assert (base / FILE).exists()


def then(act: Callable[[], object]) -> Callable[..., ReadyModel]:
    from loader.prepare.adapted import _merge

    def merge_and_act(*given: Any, **options: Any) -> ReadyModel:
        try:
            return _merge(*given, **options)
        finally:
            act()

    return merge_and_act


@pytest.mark.parametrize("rotten", ["base", "adapter"])
def test_what_was_fetched_before_and_rotted(
    job: Job, models: tuple[Path, Path], tmp_path: Path, rotten: str
) -> None:
    job.put(models[0], "checkpoint-5", job="basejob")

    def prepare(**own: Any) -> ReadyModel:
        named: dict[str, Any] = {"base_model": "checkpoint:basejob/rank-0/checkpoint-5/"} | own
        return boot.prepare(job.settings("rank-0/", jobs=("job1", "basejob"), **named))

    prepare(adapter_policy="attach")
    name = "basejob/rank-0/checkpoint-5/model.safetensors"
    if rotten == "adapter":
        name = "job1/rank-0/checkpoint-10/adapter_model.safetensors"
    path = job.root / name
    flip(path)
    with pytest.raises(UnprovedError, match="not what was fetched") as caught:
        prepare(adapter_policy="merge", verify="size")
    assert caught.value.problems == (str(path),)
    assert not models_in(job)
    assert is_right(prepare(adapter_policy="merge", verify="size").path, models, tmp_path)


@pytest.mark.parametrize("lost", [100, 0, None])
def test_a_merged_model_that_lost_its_end(
    job: Job, base: Path, models: tuple[Path, Path], tmp_path: Path, lost: int | None
) -> None:
    """As a machine that goes down leaves it, to which nothing was synced."""
    made = merged(job, base).path
    if lost is None:
        (made / FILE).write_bytes(bytes((made / FILE).stat().st_size))
    else:
        os.truncate(made / FILE, lost)
    assert merged(job, base).path == made
    assert is_right(made, models, tmp_path)


def test_a_base_behind_a_url_that_rotted_here(
    job: Job, base: Path, models: tuple[Path, Path], tmp_path: Path
) -> None:
    def prepare(**own: Any) -> ReadyModel:
        named: dict[str, Any] = {"base_model": f"file://{base}", "allow_local_urls": True} | own
        return boot.prepare(job.settings("rank-0/", **named))

    prepare(adapter_policy="attach")
    (path,) = job.root.rglob(f"bases/**/{FILE}")
    flip(path)
    with pytest.raises(UnprovedError):
        prepare(adapter_policy="merge", verify="size")
    assert is_right(prepare(adapter_policy="merge", verify="size").path, models, tmp_path)


def test_digests_are_of_the_file_as_it_is(tmp_path: Path) -> None:
    digests, path = Digests(tmp_path / "digests"), tmp_path / "file"
    path.write_bytes(b"one")
    first = digests.of(path, "sha256")
    assert digests.of(path, "crc64nvme") != first
    assert digests.of(path, "sha256") == first
    assert not digests.folder.exists()
    for i in range(20):  # as fast as it goes, of one size
        flip(path)
        assert (digests.of(path, "sha256") == first) == bool(i % 2)
    time.sleep(0.1)
    digests.of(path, "sha256")
    (entry,) = digests.folder.iterdir()
    for text in ("", "{", "[]", '{"stamp": 1}', '{"stamp": [], "sums": {"sha256": "00"}}'):
        entry.write_text(text)
        assert digests.of(path, "sha256") == first
    with pytest.raises(LoaderError, match="cannot be read"):
        digests.of(tmp_path / "none", "sha256")
    blocked = Digests(path)  # nothing can be kept there
    assert blocked.of(path, "sha256") == first


def test_a_digest_of_parts_is_that_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 400)
    whole = Digests(tmp_path / "one").of(path, "crc64nvme")
    monkeypatch.setattr("loader.fetch.digests._PART_BYTES", 1000)
    assert Digests(tmp_path / "two").of(path, "crc64nvme") == whole
    assert whole == int(crc64nvme(path.read_bytes())).to_bytes(8, "big")
    path.write_bytes(b"")
    assert Digests(tmp_path / "two").of(path, "crc64nvme") == bytes(8)
