"""Compiled kernels from pod to pod: what is read, what is published, what is refused."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loader.config.settings import Settings
from loader.errors import ConfigError
from loader.serve.model import base_name
from loader.serve.vllm import kernel_places
from loader.serve.vllm.kernel_cache import KernelCache
from loader.serve.vllm.kernel_facts import machine_facts
from loader.timeline import Timeline
from loader.types import ReadyModel
from tests.stores import moto

SECRETS = {"aws_access_key_id": moto.ACCESS_KEY, "aws_secret_access_key": moto.SECRET_KEY}
_COMPILED = "torch_compile_cache/torch_aot_compile"


class Pods:
    """Pods with empty disks, over one place for kernels."""

    def __init__(self, location: str, folder: Path, endpoint: str) -> None:
        self.location = location
        self.folder = folder
        self._endpoint = endpoint
        self._count = 0

    def start(self, *, words: tuple[str, ...] = (), **settings: Any) -> KernelCache:
        """Return what a pod has when its kernels are here, or not to be had."""
        self._count += 1
        given = {
            "kernel_cache": self.location,
            "cache_folder": str(self.folder / f"disk-{self._count}"),
            "s3_endpoint_url": self._endpoint,
        }
        config = {
            "training_checkpoints": {
                "download_folder": str(self.folder / "downloads"),
                "artifact_references": [{"training_job_id": "job", "paths": ["rank-0/"]}],
            },
            "model_metadata": {"podloader": {"artifacts": ["x.json"]} | given | settings},
        }
        made = KernelCache(Settings.load(config, secrets=SECRETS), words, Timeline())
        made.begin()
        made.wait()
        return made

    def publish(self, kernels: KernelCache) -> None:
        """Return when all is published."""
        kernels.publish()
        for thread in threading.enumerate():
            if thread.name == "kernels":
                thread.join()


def compile_program(kernels: KernelCache, name: str, content: str = "code") -> None:
    """Do what an engine does."""
    folder = Path(kernels.environment["VLLM_CACHE_ROOT"]) / _COMPILED / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model").write_text(content)
    triton = Path(kernels.environment["TRITON_CACHE_DIR"])
    triton.mkdir(exist_ok=True)
    (triton / f"{name}.cubin").write_text(content)


def compiled(kernels: KernelCache) -> dict[str, str]:
    folder = Path(kernels.environment["VLLM_CACHE_ROOT"]) / _COMPILED
    return {path.parent.name: path.read_text() for path in folder.glob("*/model")}


@pytest.fixture(autouse=True)
def _no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)


@pytest.fixture(params=["folder", "s3"])
def pods(request: pytest.FixtureRequest, tmp_path: Path, s3_url: str) -> Iterator[Pods]:
    if request.param == "folder":
        yield Pods(str(tmp_path / "shared"), tmp_path, s3_url)
        return
    s3 = moto.client(s3_url)
    bucket = f"kernels-{abs(hash(tmp_path)) % 10**9}"
    s3.create_bucket(Bucket=bucket)
    yield Pods(f"s3://{bucket}/some/prefix/", tmp_path, s3_url)


def archives(pods: Pods, s3_url: str) -> dict[str, bytes]:
    """Return what lies at the place."""
    if not pods.location.startswith("s3://"):
        folder = Path(pods.location)
        return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}
    bucket, _, prefix = pods.location.removeprefix("s3://").partition("/")
    s3 = moto.client(s3_url)
    found = s3.list_objects_v2(Bucket=bucket).get("Contents", ())
    assert all(entry["Key"].startswith(prefix) for entry in found)
    return {
        entry["Key"].removeprefix(prefix): s3.get_object(Bucket=bucket, Key=entry["Key"])[
            "Body"
        ].read()
        for entry in found
    }


def replace_archive(pods: Pods, s3_url: str, change: Callable[[bytes], bytes]) -> None:
    ((name, content),) = archives(pods, s3_url).items()
    if not pods.location.startswith("s3://"):
        (Path(pods.location) / name).write_bytes(change(content))
        return
    bucket, _, prefix = pods.location.removeprefix("s3://").partition("/")
    moto.client(s3_url).put_object(Bucket=bucket, Key=prefix + name, Body=change(content))


def test_a_second_pod_finds_what_the_first_compiled(
    pods: Pods, s3_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "podloader")
    first = pods.start()
    assert not compiled(first)
    compile_program(first, "one")
    pods.publish(first)
    second = pods.start()
    assert compiled(second) == {"one": "code"}
    assert (Path(second.environment["TRITON_CACHE_DIR"]) / "one.cubin").read_text() == "code"
    assert "compiled kernels published to" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not list(pods.folder.rglob("*.partial"))


def test_it_is_published_once(pods: Pods, s3_url: str) -> None:
    first = pods.start()
    beside = pods.start()
    for pod, content in ((first, "first"), (beside, "beside")):
        compile_program(pod, "one", content)
        pods.publish(pod)
    before = archives(pods, s3_url)
    assert len(before) == 1
    third = pods.start()
    assert compiled(third) == {"one": "first"}
    compile_program(third, "one", "anew")
    pods.publish(third)
    assert archives(pods, s3_url) == before


def test_what_a_pod_had_to_compile_all_the_same_is_added(pods: Pods) -> None:
    first = pods.start()
    compile_program(first, "one")
    pods.publish(first)
    second = pods.start()
    compile_program(second, "two")
    pods.publish(second)
    assert compiled(pods.start()) == {"one": "code", "two": "code"}


def test_other_arguments_have_an_archive_of_their_own(pods: Pods, s3_url: str) -> None:
    first = pods.start()
    compile_program(first, "one")
    pods.publish(first)
    other = pods.start(words=("--dtype", "half"))
    assert not compiled(other)
    compile_program(other, "two")
    pods.publish(other)
    assert len(archives(pods, s3_url)) == 2
    assert compiled(pods.start()) == {"one": "code"}


def test_reading_alone(pods: Pods, s3_url: str) -> None:
    first = pods.start(kernel_cache_publish=False)
    compile_program(first, "one")
    pods.publish(first)
    assert not archives(pods, s3_url)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:4200],
        lambda content: b"",
        lambda content: b"not ours at all",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content.replace(b'"vllm": "', b'"vllm": "9'),
    ],
)
def test_a_broken_one_is_one_warning_and_made_anew(
    tmp_path: Path, s3_url: str, change: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    pods = Pods(str(tmp_path / "shared"), tmp_path, s3_url)
    first = pods.start()
    compile_program(first, "one")
    pods.publish(first)
    replace_archive(pods, s3_url, change)
    second = pods.start()
    assert not compiled(second)
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "no compiled kernels from" in warnings[0].getMessage()
    compile_program(second, "one", "again")
    pods.publish(second)
    assert compiled(pods.start()) == {"one": "again"}


def test_a_broken_object_is_made_anew(pods: Pods, s3_url: str) -> None:
    first = pods.start()
    compile_program(first, "one")
    pods.publish(first)
    replace_archive(pods, s3_url, lambda content: content[: len(content) // 2])
    second = pods.start()
    assert not compiled(second)
    compile_program(second, "one", "again")
    pods.publish(second)
    assert compiled(pods.start()) == {"one": "again"}


def test_a_disk_that_has_it_is_asked_for_nothing(
    pods: Pods, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = pods.start()
    compile_program(first, "one")
    pods.publish(first)

    def refuse(*_: object) -> None:
        raise AssertionError

    for place in ("_FolderPlace", "_S3Place"):
        monkeypatch.setattr(getattr(kernel_places, place), "get", refuse)
    again = pods.start(cache_folder=str(pods.folder / "disk-1"))
    assert compiled(again) == {"one": "code"}
    assert again.environment == first.environment
    assert not caplog.records


def test_what_is_to_follow_waits(pods: Pods, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow() -> dict[str, object]:
        asked.set()
        answer.wait()
        return machine_facts()

    monkeypatch.setattr("loader.serve.vllm.kernel_cache.machine_facts", slow)
    begin = KernelCache.wait
    monkeypatch.setattr(KernelCache, "wait", lambda self: None)
    kernels = pods.start()
    done: list[int] = []
    asked.wait()
    kernels.then(lambda: done.append(1))
    kernels.then(lambda: done.append(2))
    assert not done
    answer.set()
    begin(kernels)
    assert done == [1, 2]
    kernels.then(lambda: done.append(3))
    assert done == [1, 2, 3]


def test_a_place_that_refuses_is_a_warning(
    tmp_path: Path, s3_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    pods = Pods("s3://no-such-bucket-anywhere/x", tmp_path, s3_url)
    kernels = pods.start()
    compile_program(kernels, "one")
    pods.publish(kernels)
    assert "compiled kernels are not published to s3://no-such-bucket" in caplog.text
    (tmp_path / "file").write_text("")
    kernels = Pods(str(tmp_path / "file/below"), tmp_path, s3_url).start()
    compile_program(kernels, "one")
    caplog.clear()
    pods.publish(kernels)
    assert caplog.text.count("compiled kernels are not published to") == 1


def test_one_that_does_not_answer_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pods = Pods("s3://bucket/x", tmp_path, "http://127.0.0.1:9")
    kernels = pods.start()
    assert caplog.text.count("no compiled kernels from s3://bucket/x") == 1
    compile_program(kernels, "one")
    pods.publish(kernels)  # what is there is not known
    assert "not published" not in caplog.text


def test_a_disk_that_keeps_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, s3_url: str
) -> None:
    (tmp_path / "file").write_text("")
    pods = Pods(str(tmp_path / "shared"), tmp_path, s3_url)
    kernels = pods.start(cache_folder=str(tmp_path / "file"))
    assert kernels.environment == {}
    pods.publish(kernels)
    assert caplog.text.count("kernel_cache is of no use") == 1


def test_vllms_own_folder_is_where_they_are_kept(
    tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "own"))
    kernels = Pods(str(tmp_path / "shared"), tmp_path, s3_url).start()
    assert kernels.environment["VLLM_CACHE_ROOT"].startswith(f"{tmp_path}/own/podloader/")


def test_one_path_leads_to_whatever_model_it_is(tmp_path: Path, s3_url: str) -> None:
    pods = Pods(str(tmp_path / "shared"), tmp_path, s3_url)
    found = []
    for name in ("merge-01", "merge-02"):
        folder = tmp_path / name
        folder.mkdir()
        ready = ReadyModel(folder, (), None, folder, {})
        kernels = pods.start()
        led = kernels.lead(ready, tmp_path / "cache")
        assert led.path.resolve() == led.tokenizer.resolve() == folder
        assert base_name(led, None) == name
        found.append(led.path)
        other = replace(ready, tokenizer=tmp_path)
        assert kernels.lead(other, tmp_path / "cache").tokenizer == tmp_path
        kernels.close()
        assert not led.path.exists()
    assert found[0] == found[1]


def test_rays_workers_read_the_models_own_path(tmp_path: Path, s3_url: str) -> None:
    pods = Pods(str(tmp_path / "shared"), tmp_path, s3_url)
    ready = ReadyModel(tmp_path, (), None, tmp_path, {})
    kernels = pods.start(words=("--distributed_executor_backend", "ray"))
    assert kernels.lead(ready, tmp_path / "cache") is ready


def test_a_path_that_cannot_be_is_a_warning(
    tmp_path: Path, s3_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    ready = ReadyModel(tmp_path, (), None, tmp_path, {})
    (tmp_path / "file").write_text("")
    kernels = Pods(str(tmp_path / "shared"), tmp_path, s3_url).start()
    assert kernels.lead(ready, tmp_path / "file/below") == ready
    assert "compiled kernels are of this path alone" in caplog.text


@pytest.mark.parametrize(
    ("location", "settings"),
    [
        ("gs://bucket/x", {}),
        ("https://host/x", {}),
        ("", {}),
        ("s3://bucket/jobs/x", {"artifacts": ["s3://bucket/jobs"]}),
        ("s3://bucket/jobs", {"artifacts": ["s3://bucket/jobs/"]}),
        ("s3://bucket/models/x", {"base_model": "s3://bucket/models"}),
        ("{folder}/downloads/x", {}),
        ("{folder}/downloads", {}),
        ("{folder}/link/x", {}),
        ("{folder}/model/x", {"base_model": "{folder}/model"}),
    ],
)
def test_places_that_are_none(
    location: str, settings: dict[str, Any], tmp_path: Path, s3_url: str
) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "link").symlink_to("downloads")
    told: dict[str, Any] = {
        name: value.replace("{folder}", str(tmp_path)) if isinstance(value, str) else value
        for name, value in settings.items()
    }
    pods = Pods(location.replace("{folder}", str(tmp_path)), tmp_path, s3_url)
    if location == "":
        told["kernel_cache"] = "   :// "
    with pytest.raises(ConfigError, match="kernel_cache"):
        pods.start(**told)


def test_a_place_beside_the_jobs_is_one(tmp_path: Path, s3_url: str) -> None:
    pods = Pods(str(tmp_path / "downloads-2"), tmp_path, s3_url)
    pods.start(artifacts=["s3://bucket/jobs"])
    pods.location = "s3://no-such-bucket-anywhere/jobs-2"
    pods.start(artifacts=["s3://no-such-bucket-anywhere/jobs"])


@pytest.mark.parametrize("given", [{}, {"engine": "transformers", "kernel_cache": "s3://x/y"}])
def test_nothing_happens_where_nothing_is_set(given: dict[str, str], tmp_path: Path) -> None:
    kernels = KernelCache(Settings.without_config(given), (), Timeline())
    kernels.begin()
    kernels.wait()
    done: list[int] = []
    kernels.then(lambda: done.append(1))
    kernels.publish()
    assert done == [1]
    assert not kernels.environment
    ready = ReadyModel(tmp_path, (), None, tmp_path, {})
    assert kernels.lead(ready, tmp_path) is ready
    kernels.close()
    shutil.rmtree(tmp_path)
