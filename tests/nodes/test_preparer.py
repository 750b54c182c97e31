"""What travels between a node and who asked it to prepare."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import loader.http.statuses
import loader.prepare.inputs
import loader.stores.hub_ranges  # noqa: F401 - errors of their own
from loader import __version__
from loader.config.credentials import Secret
from loader.config.settings import Settings
from loader.errors import DiskError, LoaderError, on_node
from loader.nodes.preparer import Events, Look, NodePreparer
from loader.nodes.together import Replay
from loader.stores.base import Progress, Report
from loader.types import TrainingCheckpoints


def kinds(of: type[LoaderError] = LoaderError) -> Iterator[type[LoaderError]]:
    yield of
    for kind in of.__subclasses__():
        yield from kinds(kind)


@pytest.mark.parametrize("kind", list(kinds()))
def test_an_error_arrives_as_it_was(kind: type[LoaderError]) -> None:
    error = kind("what", where="where", got="got", next_step="next")
    back = on_node(pickle.loads(pickle.dumps(error)), "10.0.0.3")
    assert type(back) is kind
    assert str(back) == "10.0.0.3: " + str(error)
    assert back.exit_code == kind.exit_code
    assert back.to_json() == error.to_json() | {"what": "10.0.0.3: what"}


class Told(Progress):
    """Writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[object] = []

    def start(self, files: int, size_bytes: int, have_bytes: int) -> None:
        self.told.append(("start", files, size_bytes, have_bytes))

    def advance(self, count_bytes: int, path: str) -> None:
        self.told.append(("advance", count_bytes, path))

    def finish_file(self, path: str) -> None:
        self.told.append(("finish_file", path))

    def wait_for(self, what: str) -> None:
        self.told.append(("wait_for", what))

    def working(self, what: str):  # type: ignore[no-untyped-def]
        from contextlib import contextmanager

        @contextmanager
        def work() -> Iterator[Report]:
            self.told.append(("begins", what))
            yield lambda done, total: self.told.append((what, done, total))
            self.told.append(("ends", what))

        return work()


def test_a_nodes_progress_is_told_as_it_was_there(caplog: pytest.LogCaptureFixture) -> None:
    events, told = Events(), Told()
    replay = Replay(told, "10.0.0.3")
    events.start(2, 30, 0)
    for _ in range(10):
        events.advance(1, "a")
    events.finish_file("a")
    with events.working("merged") as report:
        report(1, 4)
        report(2, 4)
        events.wait_for("room")
        report(4, 4)
    events.put("log", logging.WARNING, "be careful")
    for event in pickle.loads(pickle.dumps(events.take())):
        replay.tell(event)
    assert told.told == [
        ("start", 2, 30, 0),
        ("advance", 10, "a"),
        ("finish_file", "a"),
        ("begins", "merged"),
        ("merged", 2, 4),
        ("wait_for", "room"),
        ("merged", 4, 4),
        ("ends", "merged"),
    ]
    assert caplog.messages == ["10.0.0.3: be careful"]
    assert events.take() == ()


def test_work_that_breaks_off_with_its_node_ends() -> None:
    told = Told()
    replay = Replay(told, "n")
    replay.tell(("work", 0, "merged"))
    replay.close()
    assert told.told == [("begins", "merged"), ("ends", "merged")]


def last_look(preparer: NodePreparer) -> Look:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if (look := preparer.look()).is_last:
            return look
    raise AssertionError("it does not end")


@pytest.fixture
def own_logger() -> Iterator[None]:
    """The logger is the actor's from when it begins."""
    logger = logging.getLogger("podloader")
    before = logger.handlers[:], logger.propagate
    yield
    logger.handlers[:], logger.propagate = before


@pytest.mark.usefixtures("own_logger")
def test_a_node_answers_with_its_error(tmp_path: Path) -> None:
    settings = Settings(
        training=TrainingCheckpoints(tmp_path / "down", ()), hf_token=Secret("nobody's")
    )
    preparer = NodePreparer()
    assert preparer.begin(pickle.loads(pickle.dumps(settings)), __version__) == __version__
    look = last_look(preparer)
    assert isinstance(look.error, LoaderError)
    assert "nobody's" not in repr(look)


@pytest.mark.usefixtures("own_logger")
def test_a_fault_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def prepare(*_: object) -> None:
        logging.getLogger("podloader").warning("from %s", "https://u:p@host/x?Signature=abc")
        raise ZeroDivisionError

    monkeypatch.setattr("loader.boot.prepare", prepare)
    preparer = NodePreparer()
    preparer.begin(Settings(training=TrainingCheckpoints(tmp_path, ())), __version__)
    look = last_look(preparer)
    assert "ZeroDivisionError" in look.fault
    assert ("log", logging.WARNING, "from https://host/x?…") in look.events


@pytest.mark.usefixtures("own_logger")
def test_another_version_does_not_begin(tmp_path: Path) -> None:
    preparer = NodePreparer()
    preparer.begin(Settings(training=TrainingCheckpoints(tmp_path, ())), "0.0.0")
    assert preparer.look() == Look(())


def test_the_name_of_a_node_is_no_terminals_command() -> None:
    assert on_node(DiskError("full"), "a\x1b[2J").what == "a\\x1b[2J: full"
