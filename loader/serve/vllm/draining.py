"""What a server answers from the signal on, while its engine ends the requests under way."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace
from typing import Any

from loader.status.replies import RETRY_AFTER, STATUS_PATHS, reply
from loader.status.state import Boot

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_ANSWERED = ("/metrics", *STATUS_PATHS)
_BODY_S = 2.0  # for the body of a request that is refused
_ADMITTED_S = 0.1  # for what was let in before the signal to reach the engine


class Drain:
    """Knows when vLLM begins to shut *engine* down, which it does with a time limit."""

    def __init__(self, engine: Any, boot: Boot) -> None:
        self._boot = boot
        self.begun = False
        shut_down = engine.shutdown

        def shutdown(timeout: float | None = None) -> None:
            self.begun = True
            time.sleep(_ADMITTED_S)  # in a thread
            shut_down(timeout=timeout)

        engine.shutdown = shutdown

    @property
    def boot(self) -> Boot:
        """The start, and that it is over."""
        return replace(self._boot, phase="stopping") if self.begun else self._boot


class Refusing:
    """ASGI middleware: once *drain* has begun, new requests are sent elsewhere."""

    def __init__(self, app: Any, drain: Drain) -> None:
        self._app, self._drain = app, drain

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._drain.begun and scope["path"] not in _ANSWERED:
            await _take_body(receive)
            await _refuse(scope["path"], self._drain.boot, send)
        else:
            await self._app(scope, receive, self._retried(send))

    def _retried(self, send: _Send) -> _Send:
        """Return *send* that tells those who were let in too late for the engine to try again."""

        async def sent(message: _Message) -> None:
            if self._drain.begun and message.get("status") == 500:
                headers = [*message["headers"], (b"retry-after", RETRY_AFTER.encode())]
                message = {**message, "status": 503, "headers": headers}
            await send(message)

        return sent


async def _take_body(receive: _Receive) -> None:
    """Read a request to its end: what is closed with bytes unread is reset, answer and all."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_BODY_S):
            while (await receive()).get("more_body"):
                pass


async def _refuse(path: str, boot: Boot, send: _Send) -> None:
    answer = reply(path, boot)
    headers = {
        "content-type": answer.content_type,
        "content-length": str(len(answer.body)),
        "connection": "close",
        **answer.headers,
    }
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": encoded})
    await send({"type": "http.response.body", "body": answer.body})
