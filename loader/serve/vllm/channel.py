"""What the pod and its engine process, or two nodes, tell each other: a JSON object a line."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

from loader.json_text import parse_json

_MOST_LETTERS = 1 << 24  # in a line


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

    def receive(self, most_letters: int = _MOST_LETTERS) -> dict[str, Any] | None:
        """Return what the other end tells, or None when it is gone, or tells no such thing."""
        try:
            line = self._reader.readline(most_letters)
            told = parse_json(line) if line.endswith("\n") else None
        except (OSError, ValueError):
            return None
        return told if isinstance(told, dict) else None

    def close(self) -> None:
        """Hear and tell no more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.close()
        self._socket.close()
