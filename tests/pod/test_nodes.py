"""Nodes of one model without an engine: what they tell each other, over real sockets."""

from __future__ import annotations

import contextlib
import errno
import queue
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from loader.config.credentials import Secret
from loader.errors import ConfigError, EngineError, FetchError, LoaderError
from loader.pod import leader
from loader.pod.follower import join_nodes
from loader.pod.node_group import (
    NodeEvent,
    NodeFailed,
    NodesPrepared,
    NodesServing,
    NodeStopped,
    content_digests,
)
from loader.pod.place import Place
from tests.pod.pods import master_port

_SOON_S = 10


class Node:
    """A node, and what it is told."""

    def __init__(self, place: Place, secret: Secret | None) -> None:
        self._events: queue.SimpleQueue[NodeEvent] = queue.SimpleQueue()
        self.nodes = join_nodes(place, secret, self._events.put)

    def next(self) -> NodeEvent:
        return self._events.get(timeout=_SOON_S)

    def failure(self) -> LoaderError:
        event = self.next()
        assert isinstance(event, NodeFailed), event
        return event.error

    def is_told_nothing(self) -> bool:
        try:
            self._events.get(timeout=0.3)
        except queue.Empty:
            return True
        return False


Start = Callable[..., Node]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start the node *rank* of *count*."""
    monkeypatch.setattr(leader, "_LATE_S", 2.0)
    port = master_port()
    running: list[Node] = []

    def started(rank: int, count: int = 3, secret: str = "") -> Node:
        place = Place(count, rank, "127.0.0.1", port)
        running.append(Node(place, Secret(secret) if secret else None))
        return running[-1]

    yield started
    for node in running:
        node.nodes.close()


def _prepare(*found: Node) -> None:
    for node in found:
        node.nodes.prepared({"a": "crc64nvme:1"})


def test_all_load_when_the_last_has_the_model_in_whatever_order_they_come(start: Start) -> None:
    second = start(1)
    _prepare(second)
    first = start(0)
    _prepare(first)
    assert first.is_told_nothing()
    assert "node 2" in first.nodes.waited_for()
    third = start(2)
    assert second.is_told_nothing()
    _prepare(third)
    assert [node.next() for node in (first, second, third)] == [NodesPrepared()] * 3
    first.nodes.serving()
    assert [node.next() for node in (second, third)] == [NodesServing()] * 2


def test_one_node_alone_waits_for_nobody(start: Start) -> None:
    alone = start(0, 1)
    _prepare(alone)
    assert alone.next() == NodesPrepared()
    error = EngineError("it ended")
    assert alone.nodes.fail(error) is error


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_is_everybodys_error_and_names_its_node(start: Start, failing: int) -> None:
    running = [start(rank) for rank in range(3)]
    _prepare(*running)
    assert {node.next() for node in running} == {NodesPrepared()}
    own = FetchError("a file is missing", where="s3://b/k", next_step="put it there")
    assert running[failing].nodes.fail(own) is own
    for node in running:
        if node is not running[failing]:
            error = node.failure()
            assert type(error) is FetchError
            assert error.what == f"node {failing} ({socket.gethostname()}): a file is missing"
            assert (error.where, error.next_step) == ("s3://b/k", "put it there")
            assert node.nodes.fail(error) is error
            assert node.is_told_nothing()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_is_told_to_who_comes_late(start: Start, failing: int) -> None:
    running = [start(rank) for rank in range(2)]
    own = FetchError("a file is missing")
    assert running[failing].nodes.fail(own) is own
    other = running[1 - failing].failure()
    assert running[1 - failing].nodes.fail(other) is other
    ending = threading.Thread(target=running[0].nodes.close)
    ending.start()
    late = start(2).failure()
    assert (type(late), late.what) == (FetchError, other.what)
    ending.join(_SOON_S / 2)
    assert not ending.is_alive()


@pytest.mark.parametrize("gone", [0, 1])
def test_a_node_that_is_gone_without_a_word_is_named(start: Start, gone: int) -> None:
    running = [start(rank) for rank in range(3)]
    _prepare(*running)
    assert {node.next() for node in running} == {NodesPrepared()}
    running[gone].nodes._over = True  # as one that is killed: it says nothing more
    running[gone].nodes._leave()
    for rank in {0, 1, 2} - {gone}:
        assert running[rank].failure().what.startswith(f"node {gone} (")


def test_an_engine_that_ends_because_another_did_is_not_the_cause(start: Start) -> None:
    first, second = start(0, 2), start(1, 2)
    _prepare(first, second)
    assert {first.next(), second.next()} == {NodesPrepared()}
    second.nodes._over = True  # it says nothing more
    second.nodes._leave()
    told = first.nodes.fail(EngineError("the engine's process ended", got="SIGABRT"))
    assert isinstance(told, EngineError)
    assert told.what.startswith("node 1 (")
    assert "gone" in told.what


def test_engines_that_end_at_one_time_are_all_named(start: Start) -> None:
    first, second = start(0, 2), start(1, 2)
    _prepare(first, second)
    assert {first.next(), second.next()} == {NodesPrepared()}
    second.nodes._report(EngineError("the engine's process ended", got="exit code 1"))
    told = first.nodes.fail(EngineError("the engine's process ended", got="SIGABRT"))
    assert isinstance(told, EngineError)
    assert [line.partition(" (")[0] for line in told.problems] == ["node 0", "node 1"]


def test_different_models_are_refused_by_all(start: Start) -> None:
    first, second = start(0, 2), start(1, 2)
    first.nodes.prepared({"a": "crc64nvme:1", "b": "crc64nvme:2", "c": "crc64nvme:3"})
    second.nodes.prepared({"a": "crc64nvme:1", "b": "crc64nvme:9"})
    for node in (first, second):
        error = node.failure()
        assert "different models" in error.what
        assert [problem.rpartition(" ")[2] for problem in error.problems] == ["b"]


@pytest.mark.parametrize(("rank", "count", "word"), [(1, 3, "--nnodes"), (1, 2, "two nodes")])
def test_nodes_that_do_not_belong_together(start: Start, rank: int, count: int, word: str) -> None:
    first, second = start(0, 2), start(1, 2)
    _prepare(first, second)
    assert {first.next(), second.next()} == {NodesPrepared()}
    other = start(rank, count)
    assert word in str(first.failure())
    assert isinstance(other.failure(), ConfigError)


@pytest.mark.parametrize(("ours", "theirs"), [("sesame", "other"), ("sesame", "")])
def test_who_lacks_the_token_is_refused_and_harms_nobody(
    start: Start, ours: str, theirs: str
) -> None:
    first = start(0, 2, ours)
    assert "podloader_peers_token" in start(1, 2, theirs).failure().what
    assert first.is_told_nothing()
    second = start(1, 2, ours)
    _prepare(first, second)
    assert {first.next(), second.next()} == {NodesPrepared()}


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"\xff\xff\n", b"{}\n"])
def test_strangers_at_the_port_change_nothing(start: Start, sent: bytes) -> None:
    first = start(0, 2)
    with socket.create_connection(("127.0.0.1", first.nodes.place.port + 1)) as stranger:
        stranger.sendall(sent)
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(1000):
            pass
    second = start(1, 2)
    _prepare(first, second)
    assert {first.next(), second.next()} == {NodesPrepared()}


HOSTILE = [
    b'{"kind": "node", "proof": "a \\ud800"}\n',
    b'{"kind": "node", "proof": "\\udcff b"}\n',
    b'{"rank": true}\n',
    b'{"rank": 1e999, "proof": null}\n',
    b'{"host": "' + b"a" * 10_000,
    b'{"rank": ' + b"[" * 100_000 + b"\n",
]


@pytest.mark.parametrize("secret", ["", "sesame"])
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_nothing_that_a_stranger_says_holds_its_connection(start: Start, secret: str) -> None:
    first = start(0, 2, secret)
    for said in HOSTILE:
        with _connected(first) as stranger:
            stranger.sendall(said)
            stranger.settimeout(_SOON_S / 4)
            with contextlib.suppress(ConnectionError):  # what it said was not read to its end
                while stranger.recv(1000):
                    pass
    second = start(1, 2, secret)
    _prepare(first, second)
    assert {first.next(), second.next()} == {NodesPrepared()}


def test_strangers_without_end_are_few_threads_and_do_not_keep_a_node_out(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader, "_MOST_STRANGERS", 8)
    first = start(0, 2)
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(_connected(first)) for _ in range(60)]
        for stranger in strangers[:-8]:
            stranger.settimeout(_SOON_S)
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(1000):
                    pass
        second = start(1, 2)
        _prepare(first, second)
        assert {first.next(), second.next()} == {NodesPrepared()}


def test_who_says_a_letter_now_and_then_has_a_moment_for_all_of_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader, "GREETING_S", 0.6)
    with _connected(start(0, 2)) as stranger:
        stranger.recv(1000)
        stranger.settimeout(0.1)
        for _ in range(_SOON_S * 10):
            with contextlib.suppress(TimeoutError, ConnectionError):
                stranger.sendall(b" ")
                if not stranger.recv(1000):
                    break
        else:
            pytest.fail("it is heard for ever")


def test_a_node_is_let_in_when_there_are_descriptors_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = socket.socket.accept
    refused: list[int] = []

    def without(listening: socket.socket) -> tuple[socket.socket, object]:
        if len(refused) < 2:
            refused.append(1)
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listening)

    monkeypatch.setattr(socket.socket, "accept", without)
    first, second = start(0, 2), start(1, 2)
    _prepare(first, second)
    assert {first.next(), second.next()} == {NodesPrepared()}
    assert len(refused) == 2


def _connected(node: Node) -> socket.socket:
    return socket.create_connection(("127.0.0.1", node.nodes.place.port + 1), _SOON_S)


def test_a_node_that_is_asked_to_end_asks_all(start: Start) -> None:
    first, second = start(0, 2), start(1, 2)
    _prepare(first, second)
    assert {first.next(), second.next()} == {NodesPrepared()}
    second.nodes.stop(15)
    assert first.next() == NodeStopped(15)
    first.nodes.close()
    assert second.next() == NodeStopped(15)
    assert second.is_told_nothing()


def test_nodes_that_never_come_are_named(start: Start) -> None:
    first = start(0)
    start(1)
    first.nodes.expect(1.5)
    assert first.failure().what == "node 2 did not come"


def test_node_0_that_never_comes_is_named(start: Start) -> None:
    second = start(1)
    second.nodes.expect(0.2)
    error = second.failure()
    assert error.what == "node 0 cannot be reached"
    assert error.got


def test_a_taken_port_is_a_config_error() -> None:
    with socket.create_server(("", 0)) as taken:
        place = Place(2, 0, "127.0.0.1", taken.getsockname()[1] - 1)
        with pytest.raises(ConfigError, match="--master-port"):
            join_nodes(place, None, lambda _: None)


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ([], Place()),
        (["-n", "4", "-r", "3"], Place(4, 3)),
        (["--nnodes=2", "--node_rank", "1", "--master-addr", "n0"], Place(2, 1, "n0")),
        (["--nnodes", "2", "--master-port", "7"], Place(2, 0, port=7)),
    ],
)
def test_the_place_is_what_vllms_words_say(words: list[str], place: Place) -> None:
    assert Place.read(["--port", "80", *words]) == place
    assert place.arguments()["headless"] is (place.rank > 0)


@pytest.mark.parametrize("words", [["-n", "2", "-r", "2"], ["-r", "-1"], ["-n", "x"], ["-n", "0"]])
def test_no_such_node(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        Place.read(words)


def test_digests_of_contents_alone_are_compared() -> None:
    told = {"files": {"a": "crc64nvme:x", "b": "etag 1"}, "base": {"c": ["crc64nvme:y"]}}
    assert content_digests(told) == {"files/a": "crc64nvme:x"}
