"""The next request, sent on a connection while the body before it still comes."""

from __future__ import annotations

import ssl
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme

from loader.errors import ChangedError, DeniedError, FetchError, TransientError
from loader.http import body as bodies
from loader.http import client as http
from loader.http.body import Asked, HttpStream
from loader.http.client import HttpClient, HttpOptions
from loader.http.objects import ObjectInfo
from loader.stores.presigned import PresignedStore
from loader.types import Artifact
from tests.origin import (
    Fault,
    FaultyHandler,
    FaultyOrigin,
    act,
    answer,
    ignore_range,
    reset,
    stall,
    status,
)
from tests.stores.proxy import Proxy

CONTENT = bytes(range(256)) * 4000
MIDDLE = 500_000
NOTHING = act(lambda: None)


@pytest.fixture
def artifact(origin: FaultyOrigin) -> Artifact:
    path = origin.put("x", CONTENT)
    return Artifact("job1", 0, "x", origin.sign(path.relative_to(origin.root).as_posix()))


@pytest.fixture
def connections(origin: FaultyOrigin, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The addresses of the connections that the origin took."""
    found: list[object] = []
    take = origin.process_request

    def note(request: Any, address: Any) -> None:
        found.append(address)
        take(request, address)

    monkeypatch.setattr(origin, "process_request", note)
    return found


def read(stream: HttpStream) -> bytes:
    found = bytearray()
    buffer = bytearray(1 << 16)
    with closing(stream):
        while count := stream.readinto(memoryview(buffer)):
            found += buffer[:count]
    return bytes(found)


def begin(store: PresignedStore, artifact: Artifact) -> tuple[HttpStream, ObjectInfo]:
    """Return the stream of the first half, of which something has been read."""
    stream = store.open_first(artifact, MIDDLE)
    assert stream.readinto(memoryview(bytearray(1000)))
    return stream, stream.info


def ask_next(store: PresignedStore, stream: HttpStream, artifact: Artifact) -> Asked | None:
    return store.ask_next(stream, artifact, MIDDLE, len(CONTENT), stream.info)


def both(store: PresignedStore, artifact: Artifact) -> bytes:
    """Return the second half, asked for before the first one has come.

    An origin that closes at once takes with it what has not been read of that.
    """
    stream, _ = begin(store, artifact)
    asked = ask_next(store, stream, artifact)
    assert asked is not None
    with suppress(TransientError):
        read(stream)
    return read(asked.stream())


def is_trusted(store: PresignedStore, artifact: Artifact) -> bool:
    """Return whether the origin is asked ahead."""
    stream, _ = begin(store, artifact)
    asked = ask_next(store, stream, artifact)
    read(stream)
    if asked is not None:
        asked.close()
    return asked is not None


def test_it_is_answered_on_the_same_connection(
    origin: FaultyOrigin, store: PresignedStore, artifact: Artifact, connections: list[object]
) -> None:
    stream, info = begin(store, artifact)
    asked = ask_next(store, stream, artifact)
    first_of_it = store.ask_next(stream, artifact, 0, 10, None)
    assert asked is not None
    assert first_of_it is None, "one at a time"
    assert read(stream) == CONTENT[1000:MIDDLE]
    second = asked.stream()
    begun = store.ask_next(second, artifact, 0, 10, None)
    assert begun is not None
    assert read(second) == CONTENT[MIDDLE:]
    first = begun.stream()
    assert first.info == info
    assert read(first) == CONTENT[:10]
    assert read(store.open_range(artifact, 3, 9, info)) == CONTENT[3:9], "the connection is kept"
    assert len(connections) == 1


@pytest.mark.parametrize("through", ["TLS", "a proxy"])
def test_over_tls(
    origin: FaultyOrigin,
    connections: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    through: str,
) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "storage.test").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    origin.socket = context.wrap_socket(origin.socket, server_side=True)
    path = origin.put("x", CONTENT).relative_to(origin.root).as_posix()
    url = origin.sign(path).replace("http://", "https://")
    proxy = Proxy(origin.server_port)
    if through == "a proxy":
        url = url.replace("127.0.0.1", "storage.test")
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
    store = PresignedStore(HttpClient(HttpOptions(ca_bundle=tmp_path / "ca.pem")))
    try:
        assert both(store, Artifact("job1", 0, "x", url)) == CONTENT[MIDDLE:]
    finally:
        store.close()
        proxy.stop()
    assert len(connections) == 1


def test_when_it_is_time(origin: FaultyOrigin, store: PresignedStore, artifact: Artifact) -> None:
    origin.fail("x", act(lambda: time.sleep(0.2)))
    stream = store.open_first(artifact, MIDDLE)
    told = []
    for left in range(MIDDLE - 100_000, -1, -100_000):
        rest = memoryview(bytearray(100_000))
        while rest:
            rest = rest[stream.readinto(rest) :]
        time.sleep(0.15)
        told.append(stream.is_ending(left))
        assert not stream.is_ending(left - 1), "it is not read to its end"
    stream.close()
    assert told == [False, False, False, True, False], "100 kB take 0.15 s, and an answer 0.2 s"


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_FAR_S", 0.0)


def test_a_near_origin_is_asked_nothing_ahead(
    store: PresignedStore, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "_FAR_S", 0.5)  # this machine may have other things to do
    stream, _ = begin(store, artifact)
    left = MIDDLE - 1000
    while left > 1000:
        left -= stream.readinto(memoryview(bytearray(1000)))
        assert not stream.is_ending(left)
    stream.close()


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("closes", [False, True])
def test_a_connection_that_will_be_closed_is_asked_nothing(
    origin: FaultyOrigin, store: PresignedStore, artifact: Artifact, closes: bool
) -> None:
    more = {"Connection": "close"} if closes else {}
    content_range = f"bytes 0-{MIDDLE - 1}/{len(CONTENT)}"
    origin.fail("x", answer(206, CONTENT[:MIDDLE], Content_Range=content_range, **more))
    stream, _ = begin(store, artifact)
    left = MIDDLE - 1000
    while not stream.is_ending(left) and left > 1000:
        left -= stream.readinto(memoryview(bytearray(1000)))
    assert (left > 1000) is not closes
    stream.close()


def hang_up_behind_it(handler: FaultyHandler) -> bool:
    """Answer, and close without having said so."""
    handler.close_connection = True
    send = handler.copy

    def copy(fd: int, start: int, end: int) -> None:
        send(fd, start, end)
        handler.close_connection = True

    handler.copy = copy  # type: ignore[method-assign]
    return False


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([hang_up_behind_it], id="closes behind the body"),
        pytest.param([NOTHING, reset], id="resets"),
        pytest.param([NOTHING, stall(1.5)], id="says nothing"),
        pytest.param([NOTHING, status(400)], id="does not understand"),
        pytest.param([NOTHING, answer(206, b"x", Content_Range="bytes 0-0/9")], id="wrong range"),
    ],
)
def test_what_is_not_answered_is_asked_anew(
    origin: FaultyOrigin,
    store: PresignedStore,
    artifact: Artifact,
    connections: list[object],
    monkeypatch: pytest.MonkeyPatch,
    faults: list[Fault],
) -> None:
    monkeypatch.setattr(http, "_NEXT_S", 0.2)
    origin.fail("x", *faults)
    assert both(store, artifact) == CONTENT[MIDDLE:]
    assert len(connections) == 2
    assert not is_trusted(store, artifact)


def test_a_body_that_breaks_off_behind_it(
    origin: FaultyOrigin, store: PresignedStore, artifact: Artifact
) -> None:
    sent = threading.Event()

    def break_off(handler: FaultyHandler) -> bool:
        def copy(fd: int, start: int, end: int) -> None:
            FaultyHandler.copy(handler, fd, start, end - 5)
            sent.wait(5)
            handler.close_connection = True

        handler.copy = copy  # type: ignore[method-assign]
        return False

    origin.fail("x", break_off)
    stream, _ = begin(store, artifact)
    asked = ask_next(store, stream, artifact)
    sent.set()
    assert asked is not None
    with pytest.raises(TransientError):
        read(stream)
    assert read(asked.stream()) == CONTENT[MIDDLE:]
    assert not is_trusted(store, artifact)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (status(503), TransientError),
        (status(412), ChangedError),
        (status(403), DeniedError),
        (ignore_range, FetchError),
    ],
)
def test_what_it_is_refused_with_is_an_error_as_ever(
    origin: FaultyOrigin,
    store: PresignedStore,
    artifact: Artifact,
    fault: Fault,
    error: type[Exception],
) -> None:
    origin.fail("x", NOTHING, fault)
    with pytest.raises(error):
        both(store, artifact)
    assert len(origin.ranges_of("x")) == 2
    assert is_trusted(store, artifact)


def test_another_version_is_refused(
    origin: FaultyOrigin, store: PresignedStore, artifact: Artifact
) -> None:
    stream, _ = begin(store, artifact)
    newer = origin.put("newer", CONTENT[::-1])
    newer.replace(newer.with_name("x"))  # what is being sent stays as it was
    asked = ask_next(store, stream, artifact)
    assert asked is not None
    read(stream)
    with pytest.raises(ChangedError):
        asked.stream()


@pytest.mark.parametrize("wanted", [False, True])
def test_a_body_that_is_not_read_to_its_end(
    store: PresignedStore, artifact: Artifact, connections: list[object], wanted: bool
) -> None:
    stream, _ = begin(store, artifact)
    asked = ask_next(store, stream, artifact)
    assert asked is not None
    stream.close()
    if wanted:
        assert read(asked.stream()) == CONTENT[MIDDLE:]
    else:
        asked.close()
    assert is_trusted(store, artifact)
    assert len(connections) == 2


@pytest.mark.parametrize("sooner", [False, True])
def test_one_that_is_not_wanted_takes_the_connection_with_it(
    store: PresignedStore, artifact: Artifact, connections: list[object], sooner: bool
) -> None:
    stream, info = begin(store, artifact)
    asked = ask_next(store, stream, artifact)
    assert asked is not None
    if sooner:
        asked.close()
    assert read(stream) == CONTENT[1000:MIDDLE]
    if not sooner:
        asked.close()
    assert read(store.open_range(artifact, 0, 10, info)) == CONTENT[:10]
    assert len(connections) == 2


def test_one_that_is_taken_too_soon_is_asked_anew(
    store: PresignedStore, artifact: Artifact, connections: list[object]
) -> None:
    stream, _ = begin(store, artifact)
    asked = ask_next(store, stream, artifact)
    assert asked is not None
    assert read(asked.stream()) == CONTENT[MIDDLE:]
    assert read(stream) == CONTENT[1000:MIDDLE], "nothing else read from its connection"
    assert len(connections) == 2


def test_not_on_the_connection_to_another_origin(store: PresignedStore, artifact: Artifact) -> None:
    stream, info = begin(store, artifact)
    elsewhere = Artifact("job1", 0, "x", artifact.url.replace("127.0.0.1", "localhost"))
    assert store.ask_next(stream, elsewhere, 0, 10, info) is None
    whole = ObjectInfo(len(CONTENT), ranges=False)
    assert store.ask_next(stream, artifact, 0, len(CONTENT), whole) is None
    stream.close()
