"""What is sent to an origin: where to, with which headers, in the form that a proxy wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from loader.errors import FetchError
from loader.http.objects import ObjectInfo
from loader.http.proxies import Proxy
from loader.http.response import request_head


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a connection leads, through which proxy."""

    scheme: str
    host: str
    port: int
    proxy: Proxy | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A method, the headers and the body to send."""

    method: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(default=None, repr=False)


class Wanted(NamedTuple):
    """What of an object is asked for: the bytes ``[start, end)`` of a ``span``, or all.

    ``version``: which one it has to be. ``size_bytes``: what a listing says, for origins that do
    not tell. ``is_sized``: the size has to be known.
    """

    span: tuple[int, int] | None = None
    version: ObjectInfo | None = None
    size_bytes: int | None = None
    is_sized: bool = False

    @property
    def known_bytes(self) -> int | None:
        """The object's size, as far as it is known before the answer."""
        return self.size_bytes if self.version is None else self.version.size_bytes


def range_headers(span: tuple[int, int] | None, version: ObjectInfo | None) -> dict[str, str]:
    """Return the headers that every request has, with the range and the version that it is for."""
    # Identity: a compressed body has other offsets than the object.
    headers = {"Accept-Encoding": "identity", "User-Agent": "podloader"}
    if span is not None:
        headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
    known = version.version if version is not None else None
    if known and not known.startswith("W/"):  # If-Match takes strong tags alone; see check_version
        headers["If-Match" if known.startswith('"') else "If-Unmodified-Since"] = known
    return headers


def write_message(request: Request, origin: Origin, target: str, url: str) -> bytes:
    """Return the request's bytes, in the form that a proxy wants where there is one."""
    try:
        headers = {"Host": _host(origin), **request.headers}
        if origin.proxy and origin.scheme == "http":
            target = f"http://{headers['Host']}{target}"
            headers |= origin.proxy.headers
        if request.body is not None:
            headers["Content-Length"] = str(len(request.body))
        return request_head(request.method, target, headers) + (request.body or b"")
    except ValueError:
        raise FetchError("not an http(s) URL", where=url) from None


def _host(origin: Origin) -> str:
    """Return the value of Host; signatures are of it, without the scheme's own port."""
    own = origin.port == (443 if origin.scheme == "https" else 80)
    return _name(origin) if own else place(origin)


def place(origin: Origin) -> str:
    """Return host and port as a proxy is asked for a tunnel to them.

    Raises:
        ValueError: the host is no name.
    """
    return f"{_name(origin)}:{origin.port}"


def _name(origin: Origin) -> str:
    host = origin.host if origin.host.isascii() else origin.host.encode("idna").decode()
    return f"[{host}]" if ":" in host else host
