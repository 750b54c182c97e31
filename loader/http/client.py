"""A thin HTTP/1.1 client: ranges read straight into the caller's buffer.

urllib3 and requests copy every byte through Python objects on the way; here ``answers`` reads
heads, and the body comes from the socket (see ``sockets``). Keep-alive connections, proxies from
the environment as everywhere, redirects by hand.
"""

from __future__ import annotations

import contextlib
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import SplitResult, urljoin, urlsplit

from loader.errors import (
    FetchError,
)
from loader.http.addresses import is_link_local
from loader.http.body import HttpStream, InFlight, drop
from loader.http.connection import Connection, connect
from loader.http.grammar import AnswerError
from loader.http.objects import ObjectInfo
from loader.http.pool import Pool
from loader.http.proxies import Proxies, open_tunnel
from loader.http.request import (
    Origin,
    Request,
    Wanted,
    place,
    range_headers,
    write_message,
)
from loader.http.response import Answer
from loader.http.sockets import PlainSocket, shake_hands
from loader.http.statuses import (
    UnsizedError,
    check_status,
    check_version,
    leads_here,
    object_info,
    translate,
)
from loader.http.trust import Trust

REDIRECTS = {301, 302, 303, 307, 308}
_SITE = re.compile(r"https?://[^/?#]+(?=/)")
_STALE = (ConnectionError, ssl.SSLEOFError, AnswerError)  # nothing that a new connection has to be


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """Limits of a connection. ``ca_bundle`` is trusted besides the system's certificates.

    ``connect_timeout_s`` is for all of a connection's beginning, ``stall_timeout_s`` for all of an
    answer's head, and for a body's silence. ``link_local``: whether a URL or a redirect may lead to
    the machine's own link; ``insecure_redirects``: whether one from https may lead to http;
    ``link_local_redirects``: whether a redirect may lead there where a URL may.
    ``openssl_reads``: whether OpenSSL may read a socket by itself (see ``openssl``).
    ``certificate``: of servers of our own, trusted alone. ``proxies``: whether to heed those of the
    environment.
    """

    connect_timeout_s: float = 10.0
    stall_timeout_s: float = 30.0
    least_bytes_per_s: int = 4 << 10
    ca_bundle: Path | None = None
    link_local: bool = False
    insecure_redirects: bool = False
    link_local_redirects: bool = False
    openssl_reads: bool = True
    certificate: Path | None = None
    proxies: bool = True


class HttpClient:
    """Asks, on connections that it keeps. Every method may be called from any thread."""

    def __init__(self, options: HttpOptions) -> None:
        self._options = options
        self._trust = Trust(options.ca_bundle, options.certificate)
        self._pool = Pool(options.least_bytes_per_s, options.stall_timeout_s)
        self._proxies = Proxies(heeded=options.proxies)
        self._led_to: set[str] = set()  # hosts, by redirects
        self._origins: dict[str, Origin] = {}  # by the URLs' beginning

    def get(
        self,
        url: str,
        *,
        span: tuple[int, int] | None = None,
        version: ObjectInfo | None = None,
        headers: Mapping[str, str] | None = None,
        size_bytes: int | None = None,
        is_object: bool = False,
    ) -> HttpStream:
        """Return the body of *url*, of the bytes ``[start, end)`` where *span* is given.

        *headers* go to the host of *url* alone: a redirect to another one loses them. *size_bytes*
        is what a listing says, for origins that do not tell. *is_object*: all of an object is asked
        for, which has a size.

        Raises:
            ChangedError: the object is not *version* any more.
            DeniedError: the origin refuses access.
            ExpiredError: the signature of *url* is no longer honoured.
            FetchError: another refusal that asking again does not cure.
            TransientError: everything else.
        """
        is_sized = is_object or span is not None
        wanted = Wanted(span, version, size_bytes, is_sized)
        return self._ask(Request("GET", headers or {}), url, wanted)

    def send(self, url: str, *, span: tuple[int, int]) -> InFlight:
        """Send what ``get`` sends, for ``receive``. Raises as ``get`` does."""
        return self._send(Request("GET", range_headers(span, None)), url)

    def receive(
        self, sent: InFlight, url: str, *, span: tuple[int, int], size_bytes: int | None = None
    ) -> HttpStream:
        """Return the body that answers what was *sent* to *url*. Raises as ``get`` does."""
        wanted = Wanted(span, None, size_bytes, is_sized=True)
        return self._ask(Request("GET", {}), url, wanted, sent)

    def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> ObjectInfo:
        """Return what *url* is, without its body. Raises as ``get`` does."""
        stream = self._ask(Request("HEAD", headers or {}), url, Wanted(is_sized=True))
        stream.close()
        return replace(stream.info, ranges=True)

    def post(self, url: str, body: bytes, *, headers: Mapping[str, str]) -> HttpStream:
        """Return what *url* answers to *body*. Raises as ``get`` does."""
        return self._ask(Request("POST", headers, body), url, Wanted())

    def exchange(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None = None
    ) -> tuple[int, Mapping[str, str], HttpStream]:
        """Return the status, the headers and the body of what *url* answers, whatever that is.

        For libraries that speak a service's language and read its answers themselves. No redirect
        is followed, see ``follow``.

        Raises:
            FetchError: *url* leads where nothing is asked for, or the certificate is not trusted.
            TransientError: there is no answer.
        """
        request = Request(method, {"Accept-Encoding": "identity", **headers}, body)
        got, answer = self._receive(self._send(request, url), method, Wanted())
        stream = HttpStream(self._pool, got, answer, ObjectInfo(0), Wanted(), url)
        return answer.status, answer.fields, stream

    def _ask(
        self, request: Request, url: str, wanted: Wanted, sent: InFlight | None = None
    ) -> HttpStream:
        """Return the body of *url*, by the request that was *sent* already or by one sent here."""
        first, headers = url, request.headers
        for _ in range(6):
            if sent is None:
                common = range_headers(wanted.span, wanted.version)
                whole = Request(request.method, {**common, **headers}, request.body)
                sent = self._send(whole, url)
            got, answer = self._receive(sent, request.method, wanted)
            if answer.status not in REDIRECTS or request.body is not None:
                break
            target = answer.fields.get("location")
            drop(got.connection, answer)
            url, sent = self.follow(url, target), None
            if _split(url)[:2] != _split(first)[:2]:
                headers = {}
        else:
            raise FetchError("more than 5 redirects", where=url)
        try:
            check_status(url, answer, wanted)
            info = object_info(url, answer, wanted)
            check_version(url, info, wanted.version)
        except UnsizedError:
            return self._ask_size(request, first, wanted, got, answer)
        except BaseException:
            drop(got.connection, answer)
            raise
        stream = HttpStream(self._pool, got, answer, info, wanted, first)
        try:
            stream.check_empty()
        except BaseException:
            stream.close()
            raise
        return stream

    def _ask_size(
        self, request: Request, url: str, wanted: Wanted, got: InFlight, answer: Answer
    ) -> HttpStream:
        """Return the body once more, when all of it has been read to find out how long it is."""
        if request.method != "GET" or wanted.version is not None:
            drop(got.connection, answer)
            raise UnsizedError("the origin does not tell the object's size", where=url)
        if answer.status != 200:  # it may tell where no range is asked for
            drop(got.connection, answer)
            return self._ask(request, url, wanted._replace(span=None))
        with contextlib.closing(
            HttpStream(self._pool, got, answer, ObjectInfo(0), Wanted(), url)
        ) as body:
            size_bytes = body.count()
        return self._ask(request, url, wanted._replace(size_bytes=size_bytes))

    def close(self) -> None:
        """Close every idle connection."""
        self._pool.close()

    def _send(self, request: Request, url: str) -> InFlight:
        origin, target = self._place(url)
        message = write_message(request, origin, target, url)
        kept = self._pool.take(origin)
        if kept is not None:
            # The origin may have closed it meanwhile: that is no failure, and asked anew at once.
            try:
                kept.sock.sendall(message)
                return InFlight(kept, origin, url, message, is_kept=True)
            except _STALE:
                kept.close()
            except BaseException as error:
                kept.close()
                raise translate(error, url) from None
        return self._send_anew(origin, url, message)

    def _send_anew(self, origin: Origin, url: str, message: bytes) -> InFlight:
        connection: Connection | None = None
        try:
            try:
                connection = self._connect(origin)
            except ssl.SSLCertVerificationError:
                if not self._trust.widen():
                    raise
                connection = self._connect(origin)
            connection.sock.settimeout(self._options.stall_timeout_s)
            self._check_peer(connection.sock, origin, url)
            connection.sock.sendall(message)
        except BaseException as error:
            if connection is not None:
                connection.close()
            raise translate(error, url, origin.proxy) from None
        return InFlight(connection, origin, url, message, is_kept=False)

    def _receive(self, sent: InFlight, method: str, wanted: Wanted) -> tuple[InFlight, Answer]:
        try:
            return sent, sent.connection.take_answer(method, sent.url, wanted)
        except BaseException as error:
            sent.connection.close()
            if not sent.is_kept or not isinstance(error, _STALE):
                raise translate(error, sent.url) from None
        anew = self._send_anew(sent.origin, sent.url, sent.message)
        return self._receive(anew, method, wanted)

    def follow(self, url: str, target: str | None) -> str:
        """Return where a redirect of *url* to *target* leads.

        Raises:
            FetchError: nowhere, or where it may not.
        """
        if not target:
            raise FetchError("a redirect that leads nowhere", where=url)
        try:
            found = urljoin(url, target)
        except ValueError:
            raise FetchError("a redirect to what is no URL", where=url) from None
        is_open = url.startswith("https:") and _split(found).scheme == "http"
        if is_open and not self._options.insecure_redirects:
            raise FetchError(
                "a redirect from https to http, where anybody may read and change what is sent",
                where=url,
                got=found,
                next_step="have the origin redirect to https, or set allow_insecure_redirects",
            )
        host = _split(found).hostname
        if host and host != _split(url).hostname:
            self._led_to.add(host)
        return found

    def _may_be_local(self, host: str) -> bool:
        """Return whether *host* may be of the machine's own link: whoever asks has named it so."""
        options = self._options
        return options.link_local and (options.link_local_redirects or host not in self._led_to)

    def _place(self, url: str) -> tuple[Origin, str]:
        """Return where a connection leads, and the target of the request there."""
        match = _SITE.match(url)
        if match is None:
            parts = _split(url)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            return self._origin(parts, url), target
        origin = self._origins.get(match[0])
        if origin is None:
            origin = self._origins[match[0]] = self._origin(_split(url), url)
        return origin, url[match.end() :].partition("#")[0]

    def _origin(self, parts: SplitResult, url: str) -> Origin:
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or not port:
            raise FetchError("not an http(s) URL", where=url)
        if not self._may_be_local(parts.hostname) and is_link_local(parts.hostname):
            raise leads_here(url)
        proxy = self._proxies.find(parts.scheme, parts.hostname, port)
        return Origin(parts.scheme, parts.hostname, port, proxy)

    def _check_peer(self, connected: PlainSocket, origin: Origin, url: str) -> None:
        """Refuse a name that was resolved to the machine's own link, before anything is sent."""
        if not self._may_be_local(origin.host) and origin.proxy is None:
            address = str(connected.getpeername()[0])
            if is_link_local(address):
                raise leads_here(url)

    def _connect(self, origin: Origin) -> Connection:
        first = origin.proxy or origin
        timeout_s = self._options.connect_timeout_s
        if origin.scheme == "http":
            return connect(first.host, first.port, timeout_s)
        proxy = origin.proxy
        tunnel = partial(open_tunnel, proxy=proxy, to=place(origin)) if proxy else None
        secure = partial(
            shake_hands,
            context=self._trust.context(),
            host=origin.host,
            openssl_reads=self._options.openssl_reads,
        )
        return connect(first.host, first.port, timeout_s, tunnel, secure)


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # its text may show a password
        raise FetchError("not an http(s) URL", where=url) from None
