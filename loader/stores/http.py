"""A thin HTTP/1.1 client on http.client: ranges read straight into the caller's buffer.

urllib3 and requests copy every byte through Python objects on the way; here ``http.client`` reads
the headers, and the body comes from the socket (see ``sockets``). One keep-alive connection per
transfer, proxies from the environment as everywhere, redirects by hand, and each status translated
to one of our errors here and nowhere else.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from loader.errors import ChangedError, FetchError, TransientError
from loader.stores.addresses import is_link_local
from loader.stores.base import ObjectInfo
from loader.stores.checksums import read_checksums
from loader.stores.expiry import refused
from loader.stores.sockets import PlainReceiver, Receiver, TlsConnection, TlsSocket

_REDIRECTS = {301, 302, 303, 307, 308}
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_BUSY = {429, 503}
_CONTENT_RANGE = re.compile(r"bytes (?:(?P<start>\d+)-(?P<last>\d+)|\*)/(?P<total>\d+|\*)$")
_BODY_SHOWN = 64 * 1024
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
            connection, response, origin = self._send(
                replace(request, headers={**common, **own}), url
            )
            if response.status not in _REDIRECTS or request.body is not None:
                break
            target = response.getheader("Location")
            connection.close()
            if not target:
                raise FetchError("a redirect that leads nowhere", where=url)
            url = urljoin(url, target)
            if urlsplit(url)[:2] != first[:2]:
                own = {}
        else:
            raise FetchError("more than 5 redirects", where=url)
        try:
            _check_status(url, response, span)
            sized = span is not None or request.method == "HEAD"
            info = _object_info(url, response, span, sized=sized)
            _check_version(url, info, version)
        except BaseException:
            connection.close()
            raise
        return HttpStream(self, origin, connection, response, info, url)

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
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse, _Origin]:
        parts = urlsplit(url)
        origin = self._origin(parts, url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = dict(request.headers)
        if origin.proxy and origin.scheme == "http":
            target = f"http://{parts.netloc.rpartition('@')[2]}{target}"
            headers |= _proxy_authorization(origin.proxy)
        with self._lock:
            idle = self._idle.get(origin)
            connection = idle.pop() if idle else None
        if connection is not None:
            # The origin may have closed it meanwhile: that is no failure, and asked anew at once.
            try:
                connection.request(request.method, target, request.body, headers)
                return connection, connection.getresponse(), origin
            except _STALE:
                connection.close()
            except BaseException as error:
                connection.close()
                raise _translate(error, url) from None
        connection = self._connect(origin)
        try:
            connection.connect()
            if connection.sock is not None:
                connection.sock.settimeout(self._options.stall_timeout_s)
                self._check_peer(connection.sock, origin, url)
            connection.request(request.method, target, request.body, headers)
            return connection, connection.getresponse(), origin
        except BaseException as error:
            connection.close()
            raise _translate(error, url) from None

    def _origin(self, parts: SplitResult, url: str) -> _Origin:
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or not port:
            raise FetchError("not an http(s) URL", where=url)
        if not self._options.link_local and is_link_local(parts.hostname):
            raise _leads_here(url)
        proxy = self._proxies.get(parts.scheme)
        if proxy and urllib.request.proxy_bypass(parts.hostname):
            proxy = None
        return _Origin(parts.scheme, parts.hostname, port, proxy)

    def _check_peer(self, connected: socket.socket, origin: _Origin, url: str) -> None:
        """Refuse a name that was resolved to the machine's own link, before anything is sent."""
        if not self._options.link_local and origin.proxy is None:
            address = str(connected.getpeername()[0])
            if is_link_local(address):
                raise _leads_here(url)

    def _connect(self, origin: _Origin) -> http.client.HTTPConnection:
        host, port = origin.host, origin.port
        if origin.proxy:
            proxy = urlsplit(origin.proxy if "//" in origin.proxy else f"//{origin.proxy}")
            host, port = proxy.hostname or "", proxy.port or 8080
        timeout_s = self._options.connect_timeout_s
        if origin.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=timeout_s)
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
        response: http.client.HTTPResponse,
        info: ObjectInfo,
        url: str,
    ) -> None:
        self._client = client
        self._origin = origin
        self._connection = connection
        self._response = response
        self._url = url
        self._left = response.length
        self._ahead: int | None = None  # of the body, what came with the headers; None: not known
        self._sock = connection.sock  # None where the origin closes it after this answer
        self._receiver: Receiver | None = None
        self.info = info

    def readinto(self, buffer: memoryview, /) -> int:
        """Put what has arrived into *buffer* and return the count, 0 at the body's end."""
        try:
            if self._left is None:
                return self._response.readinto(buffer)
            count = self._read_once(buffer[: self._left]) if self._left else 0
        except (OSError, http.client.HTTPException) as error:
            raise _translate(error, self._url) from None
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
        reader = self._response.fp
        if self._ahead is None:
            self._ahead = len(reader.peek())
        if self._ahead or self._sock is None:
            count = int(reader.readinto1(buffer[: self._ahead or None]))
            self._ahead = max(self._ahead - count, 0)
            return count
        if self._receiver is None:
            tls = isinstance(self._sock, TlsSocket)
            self._receiver = self._sock if tls else PlainReceiver(self._sock)
        return self._receiver.recv_into(buffer)

    def read_all(self, limit_bytes: int) -> bytes:
        """Return the whole body.

        Raises:
            FetchError: it is longer than *limit_bytes*.
        """
        try:
            body = self._response.read(limit_bytes + 1)
        except (OSError, http.client.HTTPException) as error:
            raise _translate(error, self._url) from None
        if len(body) > limit_bytes:
            raise FetchError(
                "the answer is too long", where=self._url, expected=f"at most {limit_bytes} bytes"
            )
        return body

    def close(self) -> None:
        """Give the connection back where the body was read to its end, else drop it."""
        whole = self._left == 0 or self._response.isclosed()
        self._response.close()
        if whole and not self._response.will_close:
            if isinstance(self._receiver, PlainReceiver):
                self._receiver.release()
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


def _check_status(
    url: str, response: http.client.HTTPResponse, span: tuple[int, int] | None
) -> None:
    status = response.status
    if status in (200, 206) or (status == 416 and span == (0, 1)):
        return
    if status in _TRANSIENT:
        error = TransientError(f"HTTP {status} {response.reason}", where=url)
        error.retry_after_s = _retry_after(response)
        error.busy = status in _BUSY
        raise error
    if status == 412:
        raise _changed(url, "it is another version now")
    if status == 416:
        raise _changed(url, "it is shorter now")
    body = response.read(_BODY_SHOWN)
    raise refused(url, status, response.reason, body)


def _object_info(
    url: str, response: http.client.HTTPResponse, span: tuple[int, int] | None, *, sized: bool
) -> ObjectInfo:
    tag = response.getheader("ETag", "")
    version = tag if tag.startswith('"') else response.getheader("Last-Modified")
    checksums = read_checksums(response.getheaders())
    if response.status == 200:
        length = response.getheader("Content-Length")
        if length is None and sized:
            raise FetchError("the origin does not tell the object's size", where=url)
        return ObjectInfo(int(length or 0), version, False, checksums)
    match = _CONTENT_RANGE.match(response.getheader("Content-Range", "").strip())
    if response.status == 416 and match is None:
        return ObjectInfo(0, version)  # only an empty object has no first byte
    if span is None or match is None or match["total"] == "*":
        raise FetchError(
            "an answer to a range that does not say what it holds",
            where=url,
            expected="Content-Range: bytes <start>-<last>/<size>",
            got=response.getheader("Content-Range") or "no Content-Range",
        )
    total = int(match["total"])
    if match["start"] is None:
        if total:
            raise _changed(url, "a range inside it is refused")
    elif (int(match["start"]), int(match["last"]) + 1) != (span[0], min(span[1], total)):
        raise FetchError(
            "the origin sent another range than was asked for",
            where=url,
            expected=f"bytes {span[0]}-{span[1] - 1}",
            got=match[0],
        )
    return ObjectInfo(total, version, True, checksums)


def _check_version(url: str, info: ObjectInfo, asked: ObjectInfo | None) -> None:
    if asked is None:
        return
    if info.size_bytes != asked.size_bytes:
        raise _changed(url, f"{info.size_bytes} bytes instead of {asked.size_bytes}")
    if asked.version and info.version and info.version != asked.version:
        raise _changed(url, f"version {info.version} instead of {asked.version}")


def _leads_here(url: str) -> FetchError:
    return FetchError(
        "an address of this machine's own link, where clouds keep credentials",
        where=url,
        next_step="get a listing from a source that you trust, or set allow_local_urls",
    )


def _changed(url: str, got: str) -> ChangedError:
    return ChangedError(
        "the object changed while it was being read",
        where=url,
        got=got,
        next_step="run again once nothing writes to it any more; get a new listing if it was moved",
    )


def _retry_after(response: http.client.HTTPResponse) -> float | None:
    value = response.getheader("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        until = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, until.timestamp() - time.time())


def _proxy_authorization(proxy: str) -> dict[str, str]:
    parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    if parts.username is None:
        return {}
    user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(user.encode()).decode()}


def _translate(error: BaseException, url: str) -> BaseException:
    if isinstance(error, ssl.SSLCertVerificationError):
        return FetchError(
            "the server's certificate is not trusted",
            where=url,
            got=error.verify_message,
            next_step="set ca_bundle to the PEM file of the authority that signed it",
        )
    if isinstance(error, socket.gaierror):
        return _passing("the host's name cannot be resolved", url)
    if isinstance(error, TimeoutError):
        return _passing("the connection brought nothing in time", url)
    if isinstance(error, http.client.RemoteDisconnected):
        return _passing("the connection was closed without an answer", url)
    if isinstance(error, OSError):
        return _passing(error.strerror or type(error).__name__, url)
    if isinstance(error, http.client.HTTPException):
        return _passing(f"not a whole HTTP answer ({type(error).__name__})", url)
    return error


def _passing(what: str, url: str) -> TransientError:
    return TransientError(
        what,
        where=url,
        next_step="check that this machine reaches the origin, then run again; what has been "
        "fetched is kept",
    )
