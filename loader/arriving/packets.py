"""Packets of JSON over a Unix socket (SOCK_SEQPACKET), some of them with a descriptor."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loader.json_text import parse_json

_PACKET_BYTES = 1 << 16


def packet(kind: str, **content: object) -> bytes:
    """Return a packet of *content*, far below 64 KiB."""
    return json.dumps({"kind": kind, **content}).encode()


def receive_packet(
    end: socket.socket,
    keep: Callable[[Mapping[str, Any], Iterable[int]], None] = lambda message, descriptors: None,
) -> Mapping[str, Any] | None:
    """Return the next packet, None where no more come; *keep* gets descriptors that came with it.

    Raises:
        TimeoutError: none came in the socket's time.
    """
    try:
        data, descriptors = _receive(end)
    except TimeoutError:
        raise
    except OSError:
        return None
    if not data:
        return None
    message: Mapping[str, Any] = parse_json(data)
    keep(message, descriptors)
    return message


def _receive(end: socket.socket) -> tuple[bytes, list[int]]:
    try:
        found = socket.recv_fds(end, _PACKET_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        # Said once where the other end left something unread, and before what it sent last.
        found = socket.recv_fds(end, _PACKET_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    return found[0], found[1]


@contextlib.contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """Give an address of the socket *path*, which may be longer than an address can be."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = Path(f"/proc/self/fd/{folder}")
        yield str((short if short.exists() else path.parent) / path.name)
    finally:
        os.close(folder)
