"""One model over several nodes: they begin to load together, and end together.

``--nnodes``, ``--node-rank``, ``--master-addr`` and ``--master-port`` are vLLM's. Node 0 listens on
the port behind the master's; every other node keeps one connection to it, by which both know that
the other lives. What they tell each other, as ``Channel`` writes it:

    0 -> R    nonce       to sign with the pods' shared token, where there is one
    R -> 0    node        rank, host, nnodes, vllm, proof
    R -> 0    prepared    digests: of its files
    0 -> R    load        every node has the model, and it is the same
    0 -> R    serving
    both      failed      error, rank: why all end
    both      stopping    signal: a node has been asked to end, so all are
"""

from __future__ import annotations

import signal
import socket
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loader.errors import EngineError, LoaderError, error_from_json
from loader.peers.access import Token
from loader.pod.place import Place
from loader.serve.vllm.channel import Channel

GREETING_S = 5.0
_CAUSE_S = 2.0  # an engine that loses another ends by itself: the cause may be told behind it
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}
_SEVERAL = "the engine ended on several nodes"
GONE = "its connection broke, without a word"
LOOK_THERE = "its own log lines name the cause; the kernel's, if it was killed for its memory"


@dataclass(frozen=True, slots=True)
class NodesPrepared:
    """Every node has the model."""


@dataclass(frozen=True, slots=True)
class NodesServing:
    """Node 0 answers requests."""


@dataclass(frozen=True, slots=True)
class NodeFailed:
    """A node has failed, so all end."""

    error: LoaderError


@dataclass(frozen=True, slots=True)
class NodeStopped:
    """A node was asked to end, so all are."""

    signal: int


NodeEvent = NodesPrepared | NodesServing | NodeFailed | NodeStopped


class Nodes:
    """The other nodes, as one of them sees them; *tell* is called from other threads."""

    def __init__(self, place: Place, token: Token | None, tell: Callable[[NodeEvent], None]):
        self.place = place
        self._token = token
        self._tell = tell
        self._over = False
        self._changed = threading.Condition()
        self._failure: LoaderError | None = None
        self._limit: threading.Timer | None = None

    @property
    def are_many(self) -> bool:
        """Whether there are others at all."""
        return self.place.count > 1

    @property
    def follows(self) -> bool:
        """Whether another node answers the requests."""
        return self.place.rank > 0

    def expect(self, timeout_s: float) -> None:
        """Fail where a node has not even been seen after *timeout_s*."""
        self._limit = threading.Timer(timeout_s, self._check_seen, (timeout_s,))
        self._limit.daemon = True
        self._limit.start()

    @abstractmethod
    def waited_for(self) -> str:
        """Return which nodes do not have the model yet, for people."""

    @abstractmethod
    def prepared(self, digests: Mapping[str, str]) -> None:
        """Say that this node has the model, whose files have *digests* where they are known."""

    def serving(self) -> None:
        """Say that requests are answered."""

    def fail(self, error: Exception) -> Exception:
        """Return why this node ends, which failed with *error*; the others are told.

        An engine that ends may have lost that of another node, which then says so.
        """
        if self._over or not self.are_many:
            return error
        if error is self._failure:  # all know it
            self._over = True
            self._leave()
            return error
        own = error if isinstance(error, LoaderError) else LoaderError(f"{error!r}")
        if isinstance(own, EngineError):
            self._report(own)
            with self._changed:
                self._changed.wait_for(lambda: self._failure or self._over, _CAUSE_S)
            if self._failure is not None and not self._over:
                error = own = self._both(own, self._failure)
        self._end("failed", error=named(own, self._me()).to_json(), rank=self.place.rank)
        return error

    def stop(self, number: int) -> None:
        """Say that this node has been asked to end by a signal."""
        self._send("stopping", signal=number)

    def close(self) -> None:
        """Say that this node ends, as it should."""
        self._end("stopping", signal=signal.SIGTERM)

    def _me(self) -> str:
        return node_name(self.place.rank, socket.gethostname())

    def _both(self, own: LoaderError, other: LoaderError) -> LoaderError:
        if not isinstance(other, EngineError) or other.got == GONE or other.what == _SEVERAL:
            return other
        return EngineError(
            _SEVERAL,
            problems=[named(own, self._me()).line, other.line],
            next_step="the engines' own log lines on those nodes tell which was the first",
        )

    def _found(self, error: LoaderError) -> None:
        """Take the first failure of another node for why all end."""
        with self._changed:
            if self._over or self._failure is not None:
                return
            self._failure = error
            self._changed.notify_all()
        self._tell(NodeFailed(error))

    def _end(self, kind: str, **content: object) -> None:
        with self._changed:
            if self._over:
                return
            self._over = True
        if self._limit is not None:
            self._limit.cancel()
        self._send(kind, **content)
        self._leave()

    def _report(self, error: LoaderError) -> None:
        """Tell who decides, of an engine's end whose cause is not known yet."""

    @abstractmethod
    def _send(self, kind: str, **content: object) -> None: ...

    @abstractmethod
    def _leave(self) -> None: ...

    @abstractmethod
    def _check_seen(self, waited_s: float) -> None: ...


def content_digests(provenance: object, place: str = "") -> dict[str, str]:
    """Return what a model's *provenance* knows of its files' contents, by their places in it."""
    found: dict[str, str] = {}
    if isinstance(provenance, Mapping):
        for name, inner in provenance.items():
            found |= content_digests(inner, f"{place}/{name}" if place else str(name))
    elif isinstance(provenance, str) and provenance.startswith("crc64nvme:"):
        found[place] = provenance
    return found


def named(error: LoaderError, node: str) -> LoaderError:
    fields = error.to_json()
    prefix = "" if str(fields["what"]).startswith(("node", _SEVERAL)) else f"{node}: "
    return error_from_json({**fields, "what": f"{prefix}{fields['what']}"})


def node_name(rank: int, host: str) -> str:
    return f"node {rank} ({host})"


def open_channel(sock: socket.socket) -> Channel:
    """Return the connection, which ends when the other machine does."""
    sock.settimeout(GREETING_S)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Channel(sock)
