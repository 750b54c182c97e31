"""The platform's REST API over a FaultyOrigin: pages, limits of rate, and refusals."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from loader.demo.origin import PROJECT
from tests.origin import FaultyOrigin

KEY = "S3CR3T-api"


class Api(ThreadingHTTPServer):
    """Knows the jobs whose files the origin has; ``page_size`` is the most it gives at once.

    The next answers are those of ``refusals``, a status and its headers each. ``changes`` are put
    over a page.
    """

    daemon_threads = True

    def __init__(self, origin: FaultyOrigin, page_size: int = 2) -> None:
        self.origin = origin
        self.page_size = page_size
        self.requests: list[str] = []
        self.refusals: list[tuple[int, dict[str, str]]] = []
        self.syncing: dict[str, str] = {}
        self.changes: dict[str, Any] = {}
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        """What ``api_url`` has to be."""
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        """Answer no more."""
        self.shutdown()
        self.server_close()

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        """Return a status and a document."""
        parts = path.strip("/").split("/")
        if (method, path) == ("POST", "/v1/training_jobs/search"):
            job = {"id": body["job_id"], "training_project": {"id": PROJECT, "name": PROJECT}}
            return 200, {"training_jobs": [job] if self._has(job["id"]) else []}
        if parts[:2] == ["v1", "loops"] and parts[4:] == ["files"]:
            return self._page(parts[3], query)
        if parts[:3] == ["v1", "training_projects", PROJECT] and self._has(parts[4]):
            if parts[5:] == ["checkpoint_files"]:
                return self._page(parts[4], query)
            if parts[5:] == ["checkpoints"]:
                entries = [{"checkpoint_id": n, "sync_status": s} for n, s in self.syncing.items()]
                return 200, {"checkpoints": entries}
        return 404, {"code": "NOT_FOUND", "message": "not found"}

    def _has(self, job: str) -> bool:
        return (self.origin.root / "training_projects" / PROJECT / "jobs" / job).is_dir()

    def _page(self, job: str, query: dict[str, str]) -> tuple[int, Any]:
        if not self._has(job):
            return 404, {"message": "not found"}
        entries = self.origin.listing(job, with_sizes=True)["checkpoint_artifacts"]
        assert isinstance(entries, list)
        start = int(query.get("page_token", 0))
        end = start + min(int(query["page_size"]), self.page_size)
        page = {
            "presigned_urls": entries[start:end],
            "total_count": len(entries),
            "next_page_token": end if end < len(entries) else None,
        }
        return 200, page | self.changes


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Api

    def do_GET(self) -> None:
        """Answer as the key and the day allow."""
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.server.requests.append(f"{self.command} {path}")
        headers: dict[str, str] = {}
        if self.headers["Authorization"] != f"Api-Key {KEY}":
            status, document = 401, {"message": "unauthorized"}
        elif self.server.refusals:
            status, headers = self.server.refusals.pop(0)
            document = {"message": "later"}
        else:
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            status, document = self.server.answer(self.command, path, query, body)
        text = json.dumps(document).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(text))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET  # noqa: N815 - the base's name

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""
