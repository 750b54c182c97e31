"""What is told of a model whose weights are on their way, and what can be followed of it."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loader import boot
from loader.arriving.filling import FillingFolder
from loader.errors import CheckpointError, FetchError
from loader.types import ReadyModel
from loader.weights.header import parse_header
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import Fault, FaultyOrigin, act, status
from tests.test_boot import Job
from tests.weights.formats.test_bounds import save_alone

FILE = "model.safetensors"
OVER_CHECKPOINT = {"base_model": "checkpoint:basejob/rank-0/checkpoint-5/"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    base = tiny_llama(root / "base", dtype=torch.bfloat16)
    return base, train_or_draw_lora(base, root / "adapter")


class Follower:
    """Follows what is announced, in a thread of its own."""

    def __init__(self) -> None:
        self.told: list[ReadyModel] = []
        self.names: set[str] = set()
        self.small: dict[str, bytes] = {}
        self.bytes: dict[str, bytes] = {}
        self.errors: list[BaseException] = []
        self.threads: list[threading.Thread] = []

    def __call__(self, filling: FillingFolder, ready: ReadyModel) -> None:
        self.told.append(ready)
        self.small = {name: path.read_bytes() for name, path in filling.small_files.items()}
        self.threads.append(threading.Thread(target=self._follow, args=(filling,)))
        self.threads[0].start()

    def _follow(self, filling: FillingFolder) -> None:
        places = {
            name: (file, info)
            for file, head in filling.heads.items()
            for name, info in parse_header(head.content, head.size_bytes, file).tensors.items()
        }
        try:
            for names in filling.follow():
                for name in names:
                    file, info = places[name]
                    descriptor = filling.open(file)
                    self.bytes[name] = os.pread(descriptor, info.size_bytes, info.start)
                    os.close(descriptor)
                    self.names.add(name)
            assert self.names == places.keys()
        except BaseException as error:
            self.errors.append(error)

    def check(self, ready: ReadyModel) -> None:
        """Check that what was followed is *ready*."""
        (told,) = self.told
        self.threads[0].join(30)
        assert not self.errors, self.errors
        assert [a.path for a in told.adapters] == [a.path for a in ready.adapters]
        wanted = load_file(ready.path / FILE)
        assert self.bytes == {
            name: tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else b""
            for name, tensor in wanted.items()
        }
        for name, content in self.small.items():
            assert (ready.path / name).read_bytes() == content, name
        assert {"config.json", "tokenizer.json"} <= self.small.keys()


def settings_of(job: Job, models: tuple[Path, Path], case: str) -> Any:
    base, adapter = models
    if case == "full":
        job.put(base, "checkpoint-10")
        return job.settings("rank-0/")
    if case == "consolidated":
        home = Path(shutil.copytree(base, job.origin.folder("job1") / "checkpoint-10"))
        (home / FILE).unlink()
        save_alone({"model": load_file(base / FILE)}, home / "pytorch_model_fsdp_0")
        return job.settings("rank-0/")
    job.put(adapter, "checkpoint-10")
    if case == "merged over a local base":
        return job.settings("rank-0/", base_model=str(base), adapter_policy="merge")
    job.put(base, "checkpoint-5", job="basejob")
    own: dict[str, Any] = OVER_CHECKPOINT | {"adapter_policy": case}
    return job.settings("rank-0/", jobs=("job1", "basejob"), **own)


@pytest.mark.parametrize(
    "case", ["full", "consolidated", "merge", "attach", "merged over a local base"]
)
def test_followed_while_it_comes(
    origin: FaultyOrigin, tmp_path: Path, models: tuple[Path, Path], case: str
) -> None:
    job, follower = Job(origin, tmp_path), Follower()
    settings = settings_of(job, models, case)
    ready = boot.prepare(settings, announce=follower)
    follower.check(ready)
    again = Follower()
    assert boot.prepare(settings, announce=again).path == ready.path
    assert not again.told  # all is here


@pytest.mark.parametrize("unlike", [False, True])
def test_nodes_with_other_weights_under_one_name(
    origin: FaultyOrigin, tmp_path: Path, models: tuple[Path, Path], unlike: bool
) -> None:
    """Digests tell when the download is over: what has been followed is not served then."""
    job, follower = Job(origin, tmp_path), Follower()
    path = job.put(models[0], "checkpoint-10") / FILE
    second = job.put(models[0], "checkpoint-10", rank=1) / FILE
    second.write_bytes(path.read_bytes()[:-1] + (b"\x01" if unlike else path.read_bytes()[-1:]))
    settings = job.settings("rank-*/checkpoint-10/")
    if unlike:
        with pytest.raises(CheckpointError, match="under one name") as error:
            boot.prepare(settings, announce=follower)
        assert len(error.value.problems) == 1
    else:
        follower.check(boot.prepare(settings, announce=follower))
    for thread in follower.threads:
        thread.join(30)


@pytest.mark.parametrize("case", ["full", "merge", "attach"])
def test_parts_of_a_model_are_there_when_it_is_told_of(
    origin: FaultyOrigin, tmp_path: Path, models: tuple[Path, Path], case: str
) -> None:
    """vLLM passes over a projection that is not there, without a word."""
    job, follower = Job(origin, tmp_path), Follower()
    settings_of(job, models, case)
    place = "job1" if case == "full" else "basejob"
    checkpoint = "checkpoint-10" if case == "full" else "checkpoint-5"
    (origin.folder(place) / checkpoint / "modules.json").write_text("[]")
    part = origin.folder(place) / checkpoint / "2_Dense" / FILE
    part.parent.mkdir()
    save_file({"linear.weight": torch.ones(4, 4)}, part)
    (part.parent / "config.json").write_text("{}")
    settings = job.settings(
        "rank-0/",
        jobs=("job1", "basejob") if place == "basejob" else ("job1",),
        **({} if case == "full" else OVER_CHECKPOINT | {"adapter_policy": case}),
    )
    ready = boot.prepare(settings, announce=follower)
    follower.threads[0].join(30)
    assert follower.small["2_Dense/" + FILE] == part.read_bytes()
    assert (ready.path / "2_Dense" / FILE).read_bytes() == part.read_bytes()


@pytest.mark.parametrize("case", ["full", "merge", "attach"])
def test_a_fetch_that_fails_ends_the_following(
    origin: FaultyOrigin, tmp_path: Path, models: tuple[Path, Path], case: str
) -> None:
    job, follower = Job(origin, tmp_path), Follower()
    settings = settings_of(job, models, case)
    nothing: Fault = act(lambda: None)
    job.origin.fail(
        f"/{FILE}", *[nothing] * 2, *[status(404)] * 20
    )  # its version and its header come
    with pytest.raises(FetchError):
        boot.prepare(settings, announce=follower)
    follower.threads[0].join(30)
    assert isinstance(follower.errors[0], FetchError)
