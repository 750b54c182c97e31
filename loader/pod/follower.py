"""A node of a model that node 0 leads: it keeps a connection to that, and hears of all by it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from loader.config.credentials import Secret
from loader.errors import EngineError, LoaderError, error_from_json
from loader.peers.access import Token
from loader.pod.leader import Leader
from loader.pod.node_group import (
    GONE,
    GREETING_S,
    LOOK_THERE,
    NodeEvent,
    Nodes,
    NodesPrepared,
    NodesServing,
    NodeStopped,
    node_name,
    open_channel,
)
from loader.pod.place import Place
from loader.serve.vllm.channel import Channel
from loader.serve.vllm.releases import installed_release
from loader.units import show_seconds

_AGAIN_S = 0.5


class Follower(Nodes):
    """A node that node 0 leads."""

    def __init__(self, place: Place, token: Token | None, tell: Callable[[NodeEvent], None]):
        super().__init__(place, token, tell)
        self._digests: Mapping[str, str] | None = None
        self._channel: Channel | None = None
        self._refusal = ""
        threading.Thread(target=self._follow, name="nodes", daemon=True).start()

    def waited_for(self) -> str:
        """Return node 0: it knows of the others."""
        return "the other nodes" if self._channel else f"node 0 ({self.place.address})"

    def prepared(self, digests: Mapping[str, str]) -> None:
        """Tell node 0, as soon as it is there."""
        with self._changed:
            self._digests = digests
            self._send("prepared", digests=digests)

    def _follow(self) -> None:
        while not self._over and not self._greet():
            time.sleep(_AGAIN_S)
        if self._channel is None:
            return
        while message := self._channel.receive():
            self._hear(message)
        self._channel.close()
        leader = node_name(0, self.place.address)
        self._found(EngineError(f"{leader} is gone", got=GONE, next_step=LOOK_THERE))

    def _greet(self) -> bool:
        """Return whether node 0 is there, and knows this one now."""
        try:
            where = (self.place.address, self.place.port + 1)
            sock = socket.create_connection(where, GREETING_S)
        except OSError as error:
            self._refusal = error.strerror or str(error)
            return False
        channel = open_channel(sock)
        nonce = str((channel.receive() or {}).get("nonce", ""))
        if not nonce:
            channel.close()
            return False
        rank = self.place.rank
        proof = self._token.ask(nonce, f"node {rank}")[1] if self._token else ""
        channel.send(
            "node",
            rank=rank,
            host=socket.gethostname(),
            nnodes=self.place.count,
            vllm=installed_release(),
            proof=proof,
        )
        sock.settimeout(None)
        with self._changed:
            self._channel = channel
            if self._digests is not None:
                self._send("prepared", digests=self._digests)
            self._changed.notify_all()
        return True

    def _hear(self, message: Mapping[str, Any]) -> None:
        match message:
            case {"kind": "load"}:
                self._tell(NodesPrepared())
            case {"kind": "serving"}:
                self._tell(NodesServing())
            case {"kind": "failed", "rank": self.place.rank}:
                self._set_over()  # all have what this node told
            case {"kind": "failed", "error": dict(error)}:
                self._found(error_from_json(error))
            case {"kind": "stopping", "signal": int(number)}:
                self._set_over()
                self._tell(NodeStopped(number))

    def fail(self, error: Exception) -> Exception:
        """Return why this node ends; node 0 may be just about to be reached."""
        with self._changed:
            self._changed.wait_for(lambda: self._channel or self._over, GREETING_S)
        return super().fail(error)

    def _set_over(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _report(self, error: LoaderError) -> None:
        self._send("failed", error=error.to_json(), rank=self.place.rank)

    def _send(self, kind: str, **content: object) -> None:
        if self._channel is not None:
            self._channel.send(kind, **content)

    def _leave(self) -> None:
        if self._channel is not None:
            self._channel.close()

    def _check_seen(self, waited_s: float) -> None:
        if self._channel is None:
            self._found(
                EngineError(
                    "node 0 cannot be reached",
                    where=f"{self.place.address}:{self.place.port + 1}",
                    expected=f"it, {show_seconds(waited_s)} after this node was prepared",
                    got=self._refusal,
                    next_step="--master-addr is node 0's address; firewalls and network policies "
                    "must let the nodes connect on every port",
                )
            )


def join_nodes(place: Place, secret: Secret | None, tell: Callable[[NodeEvent], None]) -> Nodes:
    """Return the nodes of one model, as *place* sees them; by *secret* they know each other.

    Raises:
        ConfigError: the nodes' port is taken.
    """
    kind = Follower if place.rank else Leader
    return kind(place, Token(secret) if secret else None, tell)
