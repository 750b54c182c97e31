"""The feed that an engine's workers follow: all of it, at once, and how it ends."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loader.arriving import feed as feeds
from loader.arriving.feed import Feed, Follower
from loader.errors import ChangedError, DiskError, EngineError, LoaderError
from loader.weights.header import parse_header
from tests.filling import SlowFolder

TENSORS = {f"layer.{n}": torch.full((n + 1,), float(n)) for n in range(5)}


@pytest.fixture
def filling(tmp_path: Path) -> SlowFolder:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    names = list(TENSORS)
    for number, some in enumerate((names[:3], names[3:]), 1):
        file = source / f"model-{number:05d}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in some}, file)
    return SlowFolder(source, tmp_path / "filling")


@pytest.fixture
def feed(filling: SlowFolder, tmp_path: Path) -> Iterator[Feed]:
    made = Feed(filling, tmp_path / "feed")
    yield made
    made.close()


def read(follower: Follower, filling: SlowFolder) -> Iterator[dict[str, float]]:
    """Yield the tensors that come, each with its first number."""
    while not follower.is_over:
        found = {}
        for file, places in follower.receive(wait=True):
            head = filling.heads[file]
            tensors = list(parse_header(head.content, head.size_bytes, file).tensors.values())
            for place in places:
                raw = os.pread(follower.descriptor(file), 4, tensors[place].start)
                found[tensors[place].name] = torch.frombuffer(bytearray(raw), dtype=torch.float32)
        if found:
            yield {name: float(value) for name, value in found.items()}


def follow(tmp_path: Path) -> Follower:
    return Follower(tmp_path / "feed")


def test_followers_get_what_is_here_and_what_comes(
    feed: Feed, filling: SlowFolder, tmp_path: Path
) -> None:
    filling.put(["layer.3"])
    with follow(tmp_path) as one, follow(tmp_path) as other:
        assert set(one.files) == set(filling.heads)
        first = read(one, filling)
        assert next(first) == {"layer.3": 3.0}
        filling.put(["layer.0", "layer.4"])
        assert next(first) == {"layer.0": 0.0, "layer.4": 4.0}
        # A writer's folder gets its name in between.
        filling.folder.rename(tmp_path / "renamed")
        filling.folder = tmp_path / "renamed"
        filling.put(["layer.1", "layer.2", "layer.0"])
        filling.end()
        assert next(first) == {"layer.1": 1.0, "layer.2": 2.0}
        assert list(first) == []
        found = {name: value for some in read(other, filling) for name, value in some.items()}
        assert found == {name: float(tensor[0]) for name, tensor in TENSORS.items()}
    assert not feed.broken


def test_a_packet_takes_only_so_many_numbers(
    feed: Feed, filling: SlowFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "_NUMBERS", 2)
    filling.put(list(TENSORS))
    filling.end()
    with follow(tmp_path) as follower:
        found = {name for some in read(follower, filling) for name in some}
    assert found == set(TENSORS)


def test_a_silent_source_is_no_silent_feed(
    feed: Feed, filling: SlowFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine waits as long as the feed lives, whatever the origin does."""
    monkeypatch.setattr(feeds, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(feeds, "SILENCE_S", 0.5)
    with follow(tmp_path) as follower:
        timer = threading.Timer(1.5, filling.end)
        timer.start()
        assert list(read(follower, filling)) == []
        timer.join()


def test_a_feed_that_says_nothing_is_given_up(
    feed: Feed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "SILENCE_S", 0.1)
    with follow(tmp_path) as follower, pytest.raises(EngineError, match="is gone"):
        list(follower.receive(wait=True))


@pytest.mark.parametrize("late", [False, True])
def test_the_sources_error_is_every_followers(
    feed: Feed, filling: SlowFolder, tmp_path: Path, late: bool
) -> None:
    error = ChangedError("it changed", where="there", problems=["p"] * 100)
    if late:
        filling.end(error)
    with follow(tmp_path) as follower:
        filling.end(error)
        with pytest.raises(ChangedError, match="it changed") as raised:
            list(follower.receive(wait=True))
    assert raised.value.where == "there"
    assert len(raised.value.problems) == 20
    assert feed.error is error


def test_a_feed_that_ends_is_no_end_of_the_weights(
    feed: Feed, filling: SlowFolder, tmp_path: Path
) -> None:
    filling.put(["layer.0"])
    with follow(tmp_path) as follower:
        list(follower.receive(wait=True))
        feed.close()
        with pytest.raises(LoaderError):
            list(follower.receive(wait=True))
    with pytest.raises(EngineError, match="is gone"):
        follow(tmp_path)


def test_how_far_the_slowest_follower_is(filling: SlowFolder, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    changed = threading.Condition()

    def take(done: int, total: int) -> None:
        with changed:
            told.append((done, total))
            changed.notify_all()

    def wait_for(*wanted: tuple[int, int]) -> None:
        with changed:
            assert changed.wait_for(lambda: tuple(told[-len(wanted) :]) == wanted, 10), told

    made = Feed(filling, tmp_path / "feed", take)
    total = sum(tensor.nbytes for tensor in TENSORS.values())
    assert [made.is_taken] == [False]
    with follow(tmp_path) as one, follow(tmp_path) as other:
        wait_for((0, total), (0, total))
        one.take(8)
        wait_for((0, total))
        other.take(12)
        wait_for((8, total))
        one.done()
        wait_for((12, total))
        assert [made.is_taken] == [False]
        other.done()
        wait_for((total, total))
        assert [made.is_taken] == [True]
    made.close()


def test_a_follower_that_cannot_follow_is_told_of(
    feed: Feed, filling: SlowFolder, tmp_path: Path
) -> None:
    """Though it leaves what it was sent unread."""
    filling.put(list(TENSORS))
    with follow(tmp_path) as follower:
        follower.fail("no memory to map")
    for _ in range(1000):
        if feed.broken:
            break
        threading.Event().wait(0.01)
    assert feed.broken == "no memory to map"


@pytest.mark.parametrize("how", ["silent", "cut off", "unlinked"])
def test_who_loses_the_feed_leaves_word(
    feed: Feed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Nothing that is wrong with the feed itself is the fault of the weights, or of the engine."""
    if how == "silent":
        monkeypatch.setattr(feeds, "SILENCE_S", 1.0)
    if how == "unlinked":
        (tmp_path / "feed").unlink()
        with pytest.raises(EngineError, match="is gone"):
            follow(tmp_path)
    else:
        with follow(tmp_path) as follower:
            for one in feed._followers if how == "cut off" else ():
                one.end.shutdown(socket.SHUT_RDWR)
            with pytest.raises(EngineError, match="is gone"):
                list(follower.receive(wait=True))
    assert "the feed is gone" in feed.wait_broken()
    assert feed.error is None


@pytest.mark.parametrize("error", [OSError(24, "too many files"), DiskError("no such file")])
def test_a_file_that_cannot_be_opened_is_no_fault_of_the_weights(
    feed: Feed,
    filling: SlowFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def refuse(file_name: str) -> int:
        raise error

    monkeypatch.setattr(filling, "open", refuse)
    with follow(tmp_path) as follower:
        filling.put(["layer.0"])
        with pytest.raises(LoaderError):
            list(follower.receive(wait=True))
    assert type(error).__name__ in feed.wait_broken()
    assert feed.error is None


def test_the_sockets_path_may_be_long(filling: SlowFolder, tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    made = Feed(filling, folder / "feed")
    filling.end()
    with Follower(folder / "feed") as follower:
        assert list(read(follower, filling)) == []
    made.close()
