"""Node 0 of a model, or the only one: it hears of every other, and tells all."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loader.errors import ConfigError, EngineError, LoaderError, error_from_json
from loader.peers.access import Token, new_nonce
from loader.pod.node_group import (
    GONE,
    GREETING_S,
    LOOK_THERE,
    NodeEvent,
    Nodes,
    NodesPrepared,
    NodeStopped,
    named,
    node_name,
    open_channel,
)
from loader.pod.place import MOST_NODES, Place
from loader.serve.vllm.channel import Channel
from loader.serve.vllm.releases import installed_release
from loader.units import show_seconds

_MOST_STRANGERS = 200  # who have not said yet which node they are
_MOST_HELLO_LETTERS = 4096
_MOST_HOST_LETTERS = 253
_LOOK_S = 0.5
_LATE_S = 10.0  # a node that begins with this one has come by then


@dataclass(eq=False, slots=True)
class _Link:
    channel: Channel
    name: str
    digests: Mapping[str, str] | None = None


class Leader(Nodes):
    """Node 0, and the only one where there are no others."""

    def __init__(self, place: Place, token: Token | None, tell: Callable[[NodeEvent], None]):
        super().__init__(place, token, tell)
        self._links: dict[int, _Link] = {}
        self._strangers: dict[socket.socket, float] = {}  # until when each may be silent
        self._digests: Mapping[str, str] | None = None
        self._why: Mapping[str, Any] = {}  # all end, which who comes late is told, too
        self._told: set[int] = set()
        self._wait_until = 0.0
        self._listening = _listen(place) if place.count > 1 else None
        if self._listening is not None:
            threading.Thread(target=self._accept, name="nodes", daemon=True).start()

    def waited_for(self) -> str:
        """Return those that are not ready to load."""
        with self._changed:
            links = {rank: self._links.get(rank) for rank in range(1, self.place.count)}
            return ", ".join(
                link.name if link else f"node {rank}, which has not come"
                for rank, link in links.items()
                if link is None or link.digests is None
            )

    def prepared(self, digests: Mapping[str, str]) -> None:
        """Let all load once all are prepared."""
        with self._changed:
            self._digests = digests
        self._compare()

    def serving(self) -> None:
        """Tell all."""
        self._send("serving")

    def _compare(self) -> None:
        with self._changed:
            links = list(self._links.values())
            own = self._digests
            if own is None or len(links) < self.place.count - 1:
                return
            found = [(link.name, link.digests) for link in links if link.digests is not None]
        if len(found) < len(links):
            return
        problems = [
            f"{name}: {path}" for name, digests in found for path in sorted(_unlike(own, digests))
        ]
        if problems:
            self._blame(
                EngineError(
                    "the nodes have prepared different models",
                    where=self._me(),
                    expected="the same bytes on every node",
                    problems=problems,
                    next_step="give every node the same config, and a checkpoint that stays",
                ),
                None,
            )
            return
        self._send("load")
        self._tell(NodesPrepared())

    def _accept(self) -> None:
        assert self._listening is not None
        self._listening.settimeout(_LOOK_S)
        while not self._over or self._why:
            try:
                sock, _ = self._listening.accept()
            except TimeoutError:
                pass
            except OSError:  # no descriptors for the moment, or all is over
                time.sleep(_LOOK_S)
            else:
                with self._changed:
                    self._strangers[sock] = time.monotonic() + GREETING_S
                threading.Thread(target=self._talk, args=(sock,), name="node", daemon=True).start()
            self._cut_strangers()

    def _cut_strangers(self) -> None:
        """Break off with who has not said in time which node it is, and the first of too many."""
        now = time.monotonic()
        with self._changed:
            for sock, deadline in list(self._strangers.items()):
                if deadline > now and len(self._strangers) <= _MOST_STRANGERS:
                    return
                del self._strangers[sock]
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _talk(self, sock: socket.socket) -> None:
        """Hear a node until it is gone."""
        channel = open_channel(sock)
        nonce = new_nonce()
        channel.send("nonce", nonce=nonce)
        hello = channel.receive(_MOST_HELLO_LETTERS) or {}
        with self._changed:
            self._strangers.pop(sock, None)
        rank = hello.get("rank")
        target = f"node {rank}"
        if self._token and not self._token.may_ask(str(hello.get("proof")), nonce, target):
            error = ConfigError("node 0 was given another podloader_peers_token, or none was given")
            channel.send("failed", error=error.to_json(), rank=0)
            channel.close()
            return
        if type(rank) is not int or not 0 < rank < MOST_NODES:
            channel.close()
            return
        sock.settimeout(None)
        link = _Link(channel, node_name(rank, str(hello.get("host"))[:_MOST_HOST_LETTERS]))
        if self._admits(link, rank, hello):
            while message := channel.receive():
                self._hear(link, rank, message)
            gone = EngineError(f"{link.name} is gone", got=GONE, next_step=LOOK_THERE)
            self._blame(gone, rank)
        channel.close()

    def _admits(self, link: _Link, rank: int, hello: Mapping[str, Any]) -> bool:
        with self._changed:
            why, is_over = self._why, self._over
            before = self._links.setdefault(rank, link)
        if why:
            link.channel.send("failed", **why)
            self._count({rank})
        if is_over:
            return False
        told = {"--nnodes": self.place.count, "vLLM": installed_release()}
        given = {"--nnodes": hello.get("nnodes"), "vLLM": hello.get("vllm")}
        problems = [
            f"{what} is {given[what]} on {link.name}, {told[what]} on {self._me()}"
            for what in told
            if told[what] != given[what]
        ]
        if before is not link:
            problems.append(f"two nodes are node {rank}: {before.name} and {link.name}")
        if problems:
            error = ConfigError("nodes that do not belong together", problems=problems)
            link.channel.send("failed", error=error.to_json(), rank=0)
            self._blame(error, None)
        return not problems

    def _hear(self, link: _Link, rank: int, message: Mapping[str, Any]) -> None:
        match message:
            case {"kind": "prepared", "digests": dict(digests)}:
                with self._changed:
                    link.digests = digests
                self._compare()
            case {"kind": "failed", "error": dict(error)}:
                self._blame(named(error_from_json(error), link.name), rank)
            case {"kind": "stopping", "signal": int(number)}:
                self._tell(NodeStopped(number))

    def _blame(self, error: LoaderError, rank: int | None) -> None:
        """Let all end because of *error*, of the node *rank*."""
        if not self._over and self._failure is None:
            self._send("failed", error=error.to_json(), rank=rank)
        self._found(error)

    def _send(self, kind: str, **content: object) -> None:
        with self._changed:
            links = dict(self._links)
            if kind == "failed" and not self._why:
                self._why, self._wait_until = content, time.monotonic() + _LATE_S
        for link in links.values():
            link.channel.send(kind, **content)
        if kind == "failed":
            self._count(links)

    def _count(self, told: Iterable[int]) -> None:
        with self._changed:
            self._told.update(told)
            self._changed.notify_all()

    def close(self) -> None:
        """Say that this node ends; if it has failed, wait a moment for who is to be told of it."""
        super().close()
        with self._changed:
            if self._why:
                others, left_s = self.place.count - 1, self._wait_until - time.monotonic()
                self._changed.wait_for(lambda: len(self._told) >= others, max(0.0, left_s))
            self._why = {}
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._listening is not None:
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()

    def _leave(self) -> None:
        if not self._why:
            self._stop_listening()
        with self._changed:
            links = list(self._links.values())
        for link in links:
            link.channel.close()

    def _check_seen(self, waited_s: float) -> None:
        with self._changed:
            absent = [str(r) for r in range(1, self.place.count) if r not in self._links]
        if absent:
            error = EngineError(
                f"{'nodes' if len(absent) > 1 else 'node'} {', '.join(absent)} did not come",
                where=f"{self._me()}, port {self.place.port + 1}",
                expected=f"{self.place.count} nodes {show_seconds(waited_s)} after this one",
                next_step="start podloader on each with its --node-rank and this --master-addr; "
                "firewalls and network policies must let the nodes connect on every port",
            )
            self._blame(error, 0)


def _unlike(first: Mapping[str, str], second: Mapping[str, str]) -> set[str]:
    return {path for path in first.keys() & second.keys() if first[path] != second[path]}


def _listen(place: Place) -> socket.socket:
    port = place.port + 1
    for family in (socket.AF_INET6, socket.AF_INET):
        both = family == socket.AF_INET6
        if both and not socket.has_dualstack_ipv6():
            continue
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=both)
        except OSError as error:
            refusal = error.strerror or str(error)
    raise ConfigError(
        "the port by which the nodes know of each other cannot be opened",
        where=f"port {port}, the one behind --master-port",
        got=refusal,
        next_step="choose another --master-port, the same on every node",
    )
