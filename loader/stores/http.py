"""A thin HTTP/1.1 client on http.client: ranges read straight into the caller's buffer.

urllib3 and requests copy every byte through Python objects on the way; here ``http.client``
connects, ``answers`` reads heads, and the body comes from the socket (see ``sockets``). Keep-alive
connections, proxies from the environment as everywhere, redirects by hand.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import ssl
import threading
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from loader.errors import FetchError, TransientError
from loader.stores.addresses import is_link_local
from loader.stores.answers import Answer, request_head
from loader.stores.base import ObjectInfo
from loader.stores.meanings import (
    check_status,
    check_version,
    leads_here,
    object_info,
    translate,
)
from loader.stores.sockets import PlainConnection, TlsConnection

_REDIRECTS = {301, 302, 303, 307, 308}
_STALE = (http.client.RemoteDisconnected, ConnectionError, ssl.SSLEOFError)


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """Limits of a connection. ``ca_bundle`` is trusted besides the system's certificates.

    ``link_local``: whether a URL or a redirect may lead to the machine's own link.
    """

    connect_timeout_s: float = 10.0
    stall_timeout_s: float = 30.0
    ca_bundle: Path | None = None
    link_local: bool = False


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a connection leads, through which proxy."""

    scheme: str
    host: str
    port: int
    proxy: str | None


@dataclass(frozen=True, slots=True)
class _Request:
    """A method, the headers and the body to send."""

    method: str
    headers: Mapping[str, str]
    body: bytes | None = None


class HttpClient:
    """A pool of connections. Every method may be called from any thread."""

    def __init__(self, options: HttpOptions) -> None:
        self._options = options
        self._tls: ssl.SSLContext | None = None
        self._idle: dict[_Origin, list[http.client.HTTPConnection]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._proxies = urllib.request.getproxies()

    def get(
        self,
        url: str,
        *,
        span: tuple[int, int] | None = None,
        version: ObjectInfo | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> HttpStream:
        """Return the body of *url*, of the bytes ``[start, end)`` where *span* is given.

        *headers* go to the host of *url* alone: a redirect to another one loses them.

        Raises:
            ChangedError: the object is not *version* any more.
            DeniedError: the origin refuses access.
            ExpiredError: the signature of *url* is no longer honoured.
            FetchError: another refusal that asking again does not cure.
            TransientError: everything else.
        """
        return self._ask(_Request("GET", headers or {}), url, span, version)

    def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> ObjectInfo:
        """Return what *url* is, without its body. Raises as ``get`` does."""
        stream = self._ask(_Request("HEAD", headers or {}), url, None, None)
        stream.close()
        return replace(stream.info, ranges=True)

    def post(self, url: str, body: bytes, *, headers: Mapping[str, str]) -> HttpStream:
        """Return what *url* answers to *body*. Raises as ``get`` does."""
        return self._ask(_Request("POST", headers, body), url, None, None)

    def _ask(
        self,
        request: _Request,
        url: str,
        span: tuple[int, int] | None,
        version: ObjectInfo | None,
    ) -> HttpStream:
        common, own, first = _headers(span, version), request.headers, urlsplit(url)
        for _ in range(6):
            connection, answer, origin = self._send(
                replace(request, headers={**common, **own}), url
            )
            if answer.status not in _REDIRECTS or request.body is not None:
                break
            target = answer.fields.get("location")
            _drop(connection, answer)
            if not target:
                raise FetchError("a redirect that leads nowhere", where=url)
            url = urljoin(url, target)
            if urlsplit(url)[:2] != first[:2]:
                own = {}
        else:
            raise FetchError("more than 5 redirects", where=url)
        try:
            check_status(url, answer, span, version)
            sized = span is not None or request.method == "HEAD"
            info = object_info(url, answer, span, sized=sized)
            check_version(url, info, version)
        except BaseException:
            _drop(connection, answer)
            raise
        return HttpStream(self, origin, connection, answer, info, url)

    def close(self) -> None:
        """Close every idle connection."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def give_back(self, origin: _Origin, connection: http.client.HTTPConnection) -> None:
        """Keep a connection whose last body was read to its end."""
        with self._lock:
            if not self._closed:
                self._idle.setdefault(origin, []).append(connection)
                return
        connection.close()

    def _send(
        self, request: _Request, url: str
    ) -> tuple[http.client.HTTPConnection, Answer, _Origin]:
        parts = urlsplit(url)
        origin = self._origin(parts, url)
        message = _message(request, parts, origin, url)
        with self._lock:
            idle = self._idle.get(origin)
            connection = idle.pop() if idle else None
        if connection is not None:
            # The origin may have closed it meanwhile: that is no failure, and asked anew at once.
            try:
                return connection, _exchange(connection, request.method, message), origin
            except _STALE:
                connection.close()
            except BaseException as error:
                connection.close()
                raise translate(error, url) from None
        connection = self._connect(origin)
        try:
            connection.connect()
            if connection.sock is not None:
                connection.sock.settimeout(self._options.stall_timeout_s)
                self._check_peer(connection.sock, origin, url)
            return connection, _exchange(connection, request.method, message), origin
        except BaseException as error:
            connection.close()
            raise translate(error, url) from None

    def _origin(self, parts: SplitResult, url: str) -> _Origin:
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or not port:
            raise FetchError("not an http(s) URL", where=url)
        if not self._options.link_local and is_link_local(parts.hostname):
            raise leads_here(url)
        proxy = self._proxies.get(parts.scheme)
        if proxy and urllib.request.proxy_bypass(parts.hostname):
            proxy = None
        return _Origin(parts.scheme, parts.hostname, port, proxy)

    def _check_peer(self, connected: socket.socket, origin: _Origin, url: str) -> None:
        """Refuse a name that was resolved to the machine's own link, before anything is sent."""
        if not self._options.link_local and origin.proxy is None:
            address = str(connected.getpeername()[0])
            if is_link_local(address):
                raise leads_here(url)

    def _connect(self, origin: _Origin) -> http.client.HTTPConnection:
        host, port = origin.host, origin.port
        if origin.proxy:
            proxy = urlsplit(origin.proxy if "//" in origin.proxy else f"//{origin.proxy}")
            host, port = proxy.hostname or "", proxy.port or 8080
        timeout_s = self._options.connect_timeout_s
        if origin.scheme == "http":
            return PlainConnection(host, port, timeout=timeout_s)
        connection = TlsConnection(
            host, port, timeout=timeout_s, context=self._tls_context(), server=origin.host
        )
        if origin.proxy:
            connection.set_tunnel(origin.host, origin.port, _proxy_authorization(origin.proxy))
        return connection

    def _tls_context(self) -> ssl.SSLContext:
        with self._lock:
            if self._tls is None:
                self._tls = ssl.create_default_context()
                if self._options.ca_bundle:
                    try:
                        self._tls.load_verify_locations(cafile=self._options.ca_bundle)
                    except (OSError, ssl.SSLError) as error:
                        raise FetchError(
                            "the CA bundle cannot be read",
                            where=str(self._options.ca_bundle),
                            expected="a PEM file of certificates",
                            got=str(error.strerror or error),
                            next_step="correct ca_bundle",
                        ) from None
            return self._tls


class HttpStream:
    """One response body; see ``ByteStream``."""

    def __init__(
        self,
        client: HttpClient,
        origin: _Origin,
        connection: http.client.HTTPConnection,
        answer: Answer,
        info: ObjectInfo,
        url: str,
    ) -> None:
        self._client = client
        self._origin = origin
        self._connection = connection
        self._answer = answer
        self._url = url
        self._left = answer.length
        self._ahead: int | None = None  # of the body, what came with the headers; None: not known
        self._sock = connection.sock  # None where the origin closes it after this answer
        self.info = info

    def readinto(self, buffer: memoryview, /) -> int:
        """Put what has arrived into *buffer* and return the count, 0 at the body's end."""
        try:
            if self._left is None:
                return self._answer.readinto(buffer)
            count = self._read_once(buffer[: self._left]) if self._left else 0
        except (OSError, http.client.HTTPException) as error:
            raise translate(error, self._url) from None
        if not count and self._left:
            raise TransientError(
                "the body ended before its length",
                where=self._url,
                got=f"{self._left} bytes too few",
            )
        self._left -= count
        return count

    def _read_once(self, buffer: memoryview) -> int:
        """One read: bytes that came before a failure are not lost with it."""
        reader = self._answer.fp
        if self._ahead is None:
            self._ahead = len(reader.peek())
        if self._ahead or self._sock is None:
            count = int(reader.readinto1(buffer[: self._ahead or None]))
            self._ahead = max(self._ahead - count, 0)
            return count
        return int(self._sock.recv_into(buffer))

    def read_all(self, limit_bytes: int) -> bytes:
        """Return the whole body.

        Raises:
            FetchError: it is longer than *limit_bytes*.
        """
        try:
            body = self._answer.read(limit_bytes + 1)
        except (OSError, http.client.HTTPException) as error:
            raise translate(error, self._url) from None
        if len(body) > limit_bytes:
            raise FetchError(
                "the answer is too long", where=self._url, expected=f"at most {limit_bytes} bytes"
            )
        return body

    def close(self) -> None:
        """Give the connection back where the body was read to its end, else drop it."""
        whole = self._left == 0 or self._answer.isclosed()
        self._answer.close()
        if whole and not self._answer.will_close:
            self._client.give_back(self._origin, self._connection)
        else:
            self._connection.close()

    def abort(self) -> None:
        """Make a read that waits in another thread fail now."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)


def _headers(span: tuple[int, int] | None, version: ObjectInfo | None) -> dict[str, str]:
    # Identity: a compressed body has other offsets than the object.
    headers = {"Accept-Encoding": "identity", "User-Agent": "podloader"}
    if span is not None:
        headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
    if version is not None and version.version:
        tag = version.version.startswith('"')
        headers["If-Match" if tag else "If-Unmodified-Since"] = version.version
    return headers


def _message(request: _Request, parts: SplitResult, origin: _Origin, url: str) -> bytes:
    """Return the request's bytes, in the form that a proxy wants where there is one."""
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        headers = {"Host": _host(origin), **request.headers}
        if origin.proxy and origin.scheme == "http":
            target = f"http://{headers['Host']}{target}"
            headers |= _proxy_authorization(origin.proxy)
        if request.body is not None:
            headers["Content-Length"] = str(len(request.body))
        return request_head(request.method, target, headers) + (request.body or b"")
    except ValueError:
        raise FetchError("not an http(s) URL", where=url) from None


def _host(origin: _Origin) -> str:
    """Return the value of Host; signatures are of it, without the scheme's own port."""
    host = origin.host if origin.host.isascii() else origin.host.encode("idna").decode()
    host = f"[{host}]" if ":" in host else host
    own = origin.port == (443 if origin.scheme == "https" else 80)
    return host if own else f"{host}:{origin.port}"


def _drop(connection: http.client.HTTPConnection, answer: Answer) -> None:
    """Close both: the socket stays open as long as either is."""
    answer.close()
    connection.close()


def _exchange(connection: http.client.HTTPConnection, method: str, message: bytes) -> Answer:
    """Send a request and return the answer's beginning."""
    connection.sock.sendall(message)
    answer = Answer(connection.sock, method=method)
    try:
        answer.begin()
    except BaseException:
        answer.close()
        raise
    return answer


def _proxy_authorization(proxy: str) -> dict[str, str]:
    parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    if parts.username is None:
        return {}
    user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(user.encode()).decode()}
