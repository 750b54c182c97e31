"""What new requests get while a server drains, over a real socket."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from loader.serve.vllm.draining import Drain, Refusing
from loader.status.state import BootState
from loader.timeline import Timeline


async def never(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("a request was let in")


@pytest.fixture
def draining() -> Iterator[tuple[str, int]]:
    drain = Drain(SimpleNamespace(shutdown=lambda timeout: None), BootState(Timeline()).boot())
    drain.begun = True
    config = uvicorn.Config(Refusing(never, drain), lifespan="off", ws="none", log_level="error")
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    yield listening.getsockname()
    server.should_exit = True
    thread.join(10)
    listening.close()


@pytest.mark.parametrize("pause_s", [0.0, 0.2])
def test_a_body_that_comes_after_its_head_meets_no_reset(
    draining: tuple[str, int], pause_s: float
) -> None:
    body = b"x" * 20_000_000  # more than lies in buffers on the way
    head = f"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(draining, timeout=10) as client:
        client.sendall(head.encode())
        time.sleep(pause_s)
        client.sendall(body)
        time.sleep(pause_s)
        answer = b""
        while piece := client.recv(1 << 16):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: " in answer.lower()
