"""The small HTTP server that answers on the serving port until the engine takes it over.

Standard library only: it answers before anything else of podloader is imported. One thread,
whatever comes: a connection has a moment to say what it wants, and where there are too many, the
one that has waited longest makes room.
"""

from __future__ import annotations

import contextlib
import re
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus

from loader.errors import ConfigError
from loader.status.replies import UNAUTHORISED, Reply, reply
from loader.status.state import Boot

_BACKLOG = 2048  # as uvicorn's: connections wait here while the port changes hands
_CLIENT_TIMEOUT_S = 5.0  # for a request, and once more for the rest of its body
_MOST_CONNECTIONS = (
    200  # many systems give a process 1024 descriptors, and a download needs its own
)
_MOST_ACCEPTED = 64  # at a time, so that those who wait for an answer get it
_MOST_HEAD_BYTES = 1 << 16
_MOST_BODY_BYTES = 1 << 24
_CHUNK_BYTES = 1 << 16
_METHOD = re.compile(r"[A-Z]+")
_AUTHORIZATION = re.compile(rb"^authorization:[ \t]*(.*?)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket.

    Raises:
        ConfigError: the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(
            "the serving port cannot be opened",
            where=f"{host or '0.0.0.0'}:{port}",
            got=error.strerror or str(error),
            next_step="choose another: podloader serve CONFIG -- --port PORT",
        ) from None
    return listening


Allows = Callable[[str, str, str], bool]
"""Whether a request may be answered, by its method, its target and its ``Authorization``."""

Tell = Callable[[str, Boot], Reply]
"""What is answered then."""


class BootServer:
    """Answers on *listening* from a thread of its own until ``stop``; never closes the socket."""

    def __init__(
        self,
        listening: socket.socket,
        boot: Callable[[], Boot],
        tls: ssl.SSLContext | None = None,
        allows: Allows = lambda *_: True,
        tell: Tell = reply,
    ) -> None:
        self._loop = _Loop(listening, boot, tls, allows, tell)
        self._thread = threading.Thread(target=self._loop.run, name="status", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Accept no more; a second call does nothing. Connections that were accepted are answered.

        Those that come from now on wait in the socket's queue for whoever accepts next.
        """
        self._loop.stop()


@dataclass(eq=False, slots=True)
class _Connection:
    """A client: what it has said, then what it is still to be told."""

    sock: socket.socket
    deadline: float
    said: bytearray = field(default_factory=bytearray)
    untold: bytes | None = None  # None before the whole head is here
    read_bytes: int = 0
    events: int = selectors.EVENT_READ
    told: bool = False


class _Loop:
    def __init__(
        self,
        listening: socket.socket,
        boot: Callable[[], Boot],
        tls: ssl.SSLContext | None,
        allows: Allows,
        tell: Tell,
    ) -> None:
        self._listening = listening
        self._boot = boot
        self._allows, self._tell = allows, tell
        self._tls = tls
        self._selector = selectors.DefaultSelector()
        self._open: dict[_Connection, None] = {}  # the first one's time is over first
        self._waking, self._woken = socket.socketpair()
        self._stopping = threading.Event()
        self._accepts = True
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Return when nothing is accepted any more."""
        if not self._stopping.is_set():
            self._stopping.set()
            with contextlib.suppress(OSError):  # awake it may have seen that, and be over
                self._waking.send(b"x")
        self._stopped.wait()

    def run(self) -> None:
        """Answer until ``stop`` and for those who were accepted before."""
        timeout = self._listening.gettimeout()
        self._listening.setblocking(False)
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        try:
            while self._accepts or self._open:
                self._turn()
                if self._accepts and self._stopping.is_set():
                    self._accepts = False
                    self._selector.unregister(self._listening)
                    self._selector.unregister(self._woken)
                    self._listening.settimeout(timeout)
                    self._stopped.set()
        finally:
            self._stopped.set()
            self._selector.close()
            self._waking.close()
            self._woken.close()

    def _turn(self) -> None:
        first = next(iter(self._open), None)
        wait_s = None if first is None else max(0.0, first.deadline - time.monotonic())
        for key, _ in self._selector.select(wait_s):
            if isinstance(key.data, _Connection):
                if key.data in self._open:
                    self._go_on(key.data)
            elif key.fileobj is self._listening:
                self._accept()
        now = time.monotonic()
        while (first := next(iter(self._open), None)) is not None and first.deadline <= now:
            self._drop(first)

    def _accept(self) -> None:
        for _ in range(_MOST_ACCEPTED):
            try:
                sock, _ = self._listening.accept()
            except OSError as error:  # nobody any more, or no descriptors: somebody makes room
                if not isinstance(error, BlockingIOError) and self._open:
                    self._drop(next(iter(self._open)))
                return
            try:
                sock.setblocking(False)
                if self._tls is not None:
                    sock = self._tls.wrap_socket(
                        sock, server_side=True, do_handshake_on_connect=False
                    )
            except OSError:
                sock.close()
                continue
            if len(self._open) >= _MOST_CONNECTIONS:
                self._drop(next(iter(self._open)))
            connection = _Connection(sock, time.monotonic() + _CLIENT_TIMEOUT_S)
            self._open[connection] = None
            self._selector.register(sock, selectors.EVENT_READ, connection)
            self._go_on(connection)

    def _go_on(self, connection: _Connection) -> None:
        """Read and write as far as that goes without waiting."""
        events = selectors.EVENT_READ
        try:
            self._converse(connection)
            self._drop(connection)
            return
        except (BlockingIOError, ssl.SSLWantReadError):
            if connection.untold and not isinstance(connection.sock, ssl.SSLSocket):
                events = selectors.EVENT_WRITE
        except ssl.SSLWantWriteError:
            events = selectors.EVENT_WRITE
        except Exception:  # probes break off all the time
            self._drop(connection)
            return
        if events != connection.events:
            connection.events = events
            self._selector.modify(connection.sock, events, connection)

    def _converse(self, connection: _Connection) -> None:
        """Return when all is said. Raises where that has to be waited for."""
        sock = connection.sock
        while connection.untold is None:
            if not (data := sock.recv(_CHUNK_BYTES)):
                return
            connection.said += data
            if b"\r\n\r\n" in connection.said or b"\n\n" in connection.said:
                said = bytes(connection.said)
                connection.untold = _answer(said, self._boot, self._allows, self._tell)
            elif len(connection.said) > _MOST_HEAD_BYTES:
                connection.untold = _write(_refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE))
            if connection.untold is not None:
                connection.said.clear()
                connection.deadline = time.monotonic() + _CLIENT_TIMEOUT_S
                self._open[connection] = self._open.pop(connection)  # now the last
        while connection.untold:
            connection.untold = connection.untold[sock.send(connection.untold) :]
        if not connection.told:
            connection.told = True
            sock.shutdown(socket.SHUT_WR)
        # Closing a connection with unread bytes would take the answer along.
        while connection.read_bytes < _MOST_BODY_BYTES and (data := sock.recv(_CHUNK_BYTES)):
            connection.read_bytes += len(data)

    def _drop(self, connection: _Connection) -> None:
        del self._open[connection]
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.sock)
        with contextlib.suppress(OSError):
            connection.sock.close()


def _answer(head: bytes, boot: Callable[[], Boot], allows: Allows, tell: Tell) -> bytes:
    """Return the whole HTTP answer to a request that begins with *head*."""
    method, _, rest = head.partition(b"\n")[0].decode("latin-1").strip().partition(" ")
    target, _, version = rest.rpartition(" ")
    if not target or not version.startswith("HTTP/1.") or not _METHOD.fullmatch(method):
        return _write(_refusal(HTTPStatus.BAD_REQUEST))
    if target.startswith("//"):
        target = "/" + target.lstrip("/")
    given = _AUTHORIZATION.search(head)
    allowed = allows(method, target, given[1].decode("latin-1") if given else "")
    answer = tell(target, boot()) if allowed else UNAUTHORISED
    return _write(answer, only_head=method == "HEAD")


def _refusal(status: HTTPStatus) -> Reply:
    return Reply(status, "text/plain", status.phrase.encode())


def _write(answer: Reply, *, only_head: bool = False) -> bytes:
    headers = {
        "Server": "podloader",
        "Date": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()),
        "Content-Type": answer.content_type,
        "Content-Length": str(len(answer.body)),
        "Connection": "close",  # so that nothing waits on this server when it stops
        **answer.headers,
    }
    lines = [f"HTTP/1.1 {int(answer.status)} {HTTPStatus(answer.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return head if only_head else head + answer.body
