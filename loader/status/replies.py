"""What the paths of a starting pod answer. The same before and after the engine takes the port."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loader.status.page import page, part
from loader.status.state import Boot

STATUS_PATHS = ("/status", "/status.json")
_JSON = "application/json"
_HTML = "text/html; charset=utf-8"
RETRY_AFTER = "5"  # seconds
_UNAVAILABLE = {"type": "ServiceUnavailableError", "param": None, "code": 503}


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer."""

    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: {"Cache-Control": "no-store"})


UNAUTHORISED = Reply(401, _JSON, b'{"error": "Unauthorized"}')  # as vLLM says it


def reply(target: str, boot: Boot) -> Reply:
    """Return the answer to a request for *target*, a path with its query.

    Whatever is not there before the engine is: 503, in OpenAI's shape of errors.
    """
    path, _, query = target.partition("?")
    if path == "/health":
        status = 200 if boot.phase == "ready" else 503
        return _json(health(boot), status)
    if path == "/metrics":
        from loader.status.metrics import CONTENT_TYPE, exposition

        return Reply(200, CONTENT_TYPE, exposition(boot))
    if told := status_reply(path, query, boot):
        return told
    return _json({"error": _not_yet(boot)}, 503, {"Retry-After": RETRY_AFTER})


def bare_reply(target: str, boot: Boot) -> Reply:
    """Return as ``reply`` does, but for nobody's eyes: what only the engine lets in is unknown."""
    if target.partition("?")[0] == "/health":
        return _json({"status": boot.phase}, 200 if boot.phase == "ready" else 503)
    error = {"message": "the engine is not here to say who may ask", **_UNAVAILABLE}
    return _json({"error": error}, 503, {"Retry-After": RETRY_AFTER})


def status_reply(path: str, query: str, boot: Boot) -> Reply | None:
    """Return the page for people, its moving part, or the same as JSON; None for other paths."""
    if path == "/status.json":
        return _json(boot.to_json())
    if path == "/status":
        html = part(boot) if query == "part" else page(boot)
        return Reply(200, _HTML, html.encode())
    return None


def health(boot: Boot) -> dict[str, Any]:
    """Return the body of ``/health``: how far it is, and what went wrong if something did."""
    body: dict[str, Any] = {
        "status": boot.phase,
        "stage": boot.stage,
        "seconds": round(boot.now_s, 3),
        "files": {"done": boot.files_done, "total": boot.files},
        "bytes": {"done": boot.bytes_done, "total": boot.bytes},
        "bytes_per_s": round(boot.bytes_per_s),
        "left_s": None if boot.left_s is None else round(boot.left_s, 1),
    }
    if boot.weights:  # the engine waits for those that are not here
        body["weights"] = {"done": boot.weights_done, "total": boot.weights}
    return body | ({"error": dict(boot.error)} if boot.error else {})


def _not_yet(boot: Boot) -> dict[str, Any]:
    if boot.error:
        message = f"the model did not start: {boot.error.get('what', '')}"
    elif boot.phase == "ready":
        message = "this node answers no requests; node 0 of its model does"
    elif boot.phase == "stopping":
        message = "the server is stopping and takes no more requests"
    else:
        message = f"the model is still starting: {boot.stage or 'just begun'}"
    return {"message": message, **_UNAVAILABLE}


def _json(
    body: Mapping[str, Any], status: int = 200, more: Mapping[str, str] | None = None
) -> Reply:
    headers = {"Cache-Control": "no-store", **(more or {})}
    return Reply(status, _JSON, json.dumps(body).encode(), headers)
