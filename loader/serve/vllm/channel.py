"""What the pod and its engine process tell each other: one JSON object a line, on a socket pair."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

from loader.json_text import parse_json


class Channel:
    """One end. ``send`` may be called from any thread, ``receive`` from one at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._reader = end.makefile("r", encoding="utf-8")
        self._lock = threading.Lock()

    def send(self, kind: str, **content: object) -> None:
        """Tell the other end; nothing happens when that is gone."""
        line = json.dumps({"kind": kind, **content}) + "\n"
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(line.encode())

    def receive(self) -> dict[str, Any] | None:
        """Return what the other end tells, or None when it is gone."""
        try:
            line = self._reader.readline()
        except (OSError, ValueError):
            return None
        return parse_json(line) if line.endswith("\n") else None

    def close(self) -> None:
        """Hear and tell no more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.close()
        self._socket.close()
