"""A start whose weights are streamed: what it is given, when it falls back, how it ends."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loader.arriving.feed import Follower
from loader.errors import ConfigError, EngineError, FetchError
from loader.serve.model import base_name
from loader.serve.vllm import streamed_start
from loader.serve.vllm.streamed_start import StreamedStart
from loader.serve.vllm.streaming import (
    READY_TIMEOUT,
    Stream,
    ready_timeout_s,
    stream_environment,
    why_not_streamed,
)
from loader.timeline import Timeline
from loader.types import STREAM_VARIABLE, ReadyModel, ServedAdapter
from tests.filling import SlowFolder


@pytest.fixture
def filling(tmp_path: Path) -> SlowFolder:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, source / "model.safetensors")
    return SlowFolder(source, tmp_path / "filling")


@pytest.fixture
def ready(tmp_path: Path) -> ReadyModel:
    folder = tmp_path / "model"
    return ReadyModel(folder, (), None, folder, {"kind": "full"})


@pytest.fixture
def stream(filling: SlowFolder, ready: ReadyModel, tmp_path: Path) -> Iterator[Stream]:
    made = Stream(tmp_path / "cache", filling, ready, None, lambda done, total: None)
    yield made
    made.close()


def test_the_engine_gets_a_path_of_its_own_and_the_models_name(
    stream: Stream, ready: ReadyModel, tmp_path: Path
) -> None:
    assert stream.ready.path == stream.ready.tokenizer == tmp_path / "cache/.engine-0/model"
    assert base_name(stream.ready, None) == "model"
    assert not stream.publish(ready)
    assert stream.ready.path.resolve() == ready.path


def test_a_tokenizer_of_its_own_stays(
    filling: SlowFolder, ready: ReadyModel, tmp_path: Path
) -> None:
    other = replace(ready, tokenizer=tmp_path / "t")
    made = Stream(tmp_path, filling, other, None, lambda done, total: None)
    assert made.ready.tokenizer == tmp_path / "t"
    made.close()


@pytest.mark.parametrize(
    "change",
    [
        {"provenance": {"name": "other"}},
        {"path": Path("/elsewhere/other")},
        {"adapters": (ServedAdapter("x", Path("x"), 4),), "max_lora_rank": 4},
        {"tokenizer": Path("/elsewhere")},
    ],
)
def test_another_model_is_not_published(
    stream: Stream, ready: ReadyModel, change: dict[str, Any]
) -> None:
    assert "another" in stream.publish(replace(ready, **change))
    assert (stream.ready.path / ".stand-ins").exists()


def test_a_folder_that_got_its_name_in_the_end_is_the_same_model(
    stream: Stream, ready: ReadyModel, tmp_path: Path
) -> None:
    named = tmp_path / "merge-0123"
    (tmp_path / "model").rename(named)
    found = replace(ready, path=named, tokenizer=named, provenance={"name": "model", "why": "x"})
    assert not stream.publish(found)
    assert stream.ready.path.resolve() == named


def test_a_folder_that_gets_its_name_last_needs_one_from_the_settings(
    filling: SlowFolder, ready: ReadyModel, tmp_path: Path
) -> None:
    folder = tmp_path / ".consolidating.x.partial" / "model"
    unnamed = replace(ready, path=folder, tokenizer=folder)
    with pytest.raises(ConfigError, match="no name"):
        Stream(tmp_path, filling, unnamed, None, lambda done, total: None)
    made = Stream(tmp_path, filling, unnamed, "served", lambda done, total: None)
    assert not made.publish(ready)
    made.close()


@pytest.mark.parametrize(
    ("engine_args", "given"),
    [
        ({"load_format": "runai_streamer"}, []),
        ({"model_loader_extra_config": {"num_threads": 4}}, []),
        ({"distributed_executor_backend": "ray"}, []),
        ({}, ["--load-format", "auto"]),
        ({}, ["--load_format=auto"]),
        ({}, ["--config", "vllm.yaml"]),
        ({}, ["--nnodes=2"]),
        ({}, ["--distributed-executor-backend", "ray"]),
    ],
)
def test_a_users_own_way_wins(engine_args: dict[str, object], given: list[str]) -> None:
    assert why_not_streamed("stream", engine_args, given)


def test_what_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--served-model-name", "--load", "--dtype=auto", "-tp", "2"]
    assert not why_not_streamed("auto", {"dtype": "auto"}, arguments)
    assert why_not_streamed("files", {}) == "as engine_start says"
    monkeypatch.setenv("VLLM_PLUGINS", "other,podloader")
    assert not why_not_streamed("auto", {"distributed_executor_backend": "mp"})
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS" in why_not_streamed("auto", {})


def test_the_limit_of_an_engine_that_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own counts the download too, so it is lifted."""
    assert ready_timeout_s() == 600
    monkeypatch.setenv(READY_TIMEOUT, "42")
    assert ready_timeout_s() == 42
    assert float(stream_environment()[READY_TIMEOUT]) > 24 * 3600


class Engine:
    """Follows the feed beside its model, or fails with *error*."""

    def __init__(self, ready: ReadyModel, error: Exception | None, *, follows: bool) -> None:
        if follows:
            with Follower(ready.path.with_name("feed")) as follower:
                while not follower.is_over:
                    list(follower.receive(wait=True))
                if error is not None:
                    follower.fail(str(error))
                else:
                    follower.done()
        if error is not None:
            raise error
        self.closed = False

    def close(self) -> None:
        self.closed = True


Begin = Callable[..., StreamedStart]


@pytest.fixture
def begin(filling: SlowFolder, ready: ReadyModel, tmp_path: Path, monkeypatch: Any) -> Begin:
    for name in (READY_TIMEOUT, STREAM_VARIABLE):
        monkeypatch.setenv(name, "")  # so that it is put back

    def begun(error: Exception | None = None, *, follows: bool = True) -> StreamedStart:
        def start(given: ReadyModel, load_format: str | None) -> Any:
            if load_format is None:
                return "over files"
            engines.append(Engine(given, error, follows=follows))
            return engines[-1]

        made = StreamedStart(tmp_path / "cache", None, start, Timeline(quiet=True))
        made.announce(filling, ready)
        return made

    engines: list[Engine] = []
    begun.engines = engines  # type: ignore[attr-defined]
    return begun


def test_an_engine_beside_the_download(
    begin: Begin, filling: SlowFolder, ready: ReadyModel, tmp_path: Path
) -> None:
    started = begin()
    filling.put(["a", "b"])
    filling.end()
    assert isinstance(started.finish(ready), Engine)
    assert (tmp_path / "cache/.engine-0/model").resolve() == ready.path
    assert not (tmp_path / "cache/.engine-0/stand-ins").exists()


@pytest.mark.parametrize("why", ["cannot follow", "does not follow", "another"])
def test_where_it_cannot_be_used_files_are(
    begin: Begin, filling: SlowFolder, ready: ReadyModel, tmp_path: Path, why: str
) -> None:
    started = begin(
        EngineError("no map") if why == "cannot follow" else None, follows=why != "does not follow"
    )
    filling.put(["a", "b"])
    filling.end()
    found = replace(ready, provenance={"name": "x"}) if why == "another" else ready
    served: Any = started.finish(found)
    assert served == "over files"
    assert all(engine.closed for engine in begin.engines)  # type: ignore[attr-defined]
    assert not list((tmp_path / "cache/.engine-0").iterdir())


def test_an_engine_that_fails_by_itself_is_not_tried_again(
    begin: Begin, filling: SlowFolder, ready: ReadyModel
) -> None:
    started = begin(EngineError("no memory"), follows=False)
    filling.put(["a", "b"])
    filling.end()
    with pytest.raises(EngineError, match="no memory"):
        started.finish(ready)


def test_an_engine_that_hangs_when_all_is_here_is_ended(
    filling: SlowFolder, ready: ReadyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own limit is lifted, for the sake of the download; it holds from then on."""
    for name in (READY_TIMEOUT, STREAM_VARIABLE):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(streamed_start, "_limit_s", lambda: 0.5)

    def start(given: ReadyModel, load_format: str | None) -> Any:
        core = multiprocessing.get_context("spawn").Process(
            target=time.sleep, args=(300,), name="EngineCore_DP0"
        )
        core.start()
        core.join()
        raise EngineError("the engine's core ended")

    started = StreamedStart(tmp_path / "cache", None, start, Timeline(quiet=True))
    started.announce(filling, ready)
    filling.put(["a", "b"])
    filling.end()
    with pytest.raises(EngineError, match="did not start in time") as raised:
        started.finish(ready)
    assert "0.5" in (raised.value.expected or "")


@pytest.mark.parametrize("here", [["a"], ["a", "b"]])
def test_a_model_that_fails_ends_its_engine(
    begin: Begin, filling: SlowFolder, tmp_path: Path, here: list[str]
) -> None:
    started = begin()
    filling.put(here)
    if len(here) == 2:
        filling.end()
    started.abort(FetchError("a wrong sum"))
    assert all(engine.closed for engine in begin.engines)  # type: ignore[attr-defined]
    assert not list((tmp_path / "cache/.engine-0").iterdir())


@pytest.mark.usefixtures("begin")
def test_nothing_announced_is_nothing_started(tmp_path: Path, ready: ReadyModel) -> None:
    given: list[object] = []

    def start(*asked: object) -> Any:
        given.append(asked)
        return "over files"

    started = StreamedStart(tmp_path, None, start, Timeline(quiet=True))
    served: Any = started.finish(ready)
    assert served == "over files"
    assert given == [(ready, None)]
    started.abort(FetchError("x"))
