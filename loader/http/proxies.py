"""The proxies that the environment names: which one leads to a host, and how it is asked.

``HTTPS_PROXY``, ``HTTP_PROXY`` and ``NO_PROXY`` in capitals or small letters, as curl and urllib
read them. A proxy is spoken to in plain HTTP; what goes to an https origin goes through its tunnel.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from loader.errors import ConfigError, FetchError, TransientError
from loader.http.grammar import AnswerError
from loader.http.response import Answer, Inbox, request_head
from loader.http.sockets import PlainSocket


@dataclass(frozen=True, slots=True)
class Proxy:
    """Where a proxy listens; ``authorization`` names the user to it, where its URL does."""

    host: str
    port: int
    authorization: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"the proxy {self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """What it wants to be told with a request."""
        return {"Proxy-Authorization": self.authorization} if self.authorization else {}


class Proxies:
    """What the environment said when this was made; nothing where it is not *heeded*."""

    def __init__(self, *, heeded: bool = True) -> None:
        self._urls: Mapping[str, str] = _environment() if heeded else {}
        self._direct = [name.strip() for name in self._urls.get("no", "").split(",")]

    def find(self, scheme: str, host: str, port: int) -> Proxy | None:
        """Return the proxy that leads to *host*, None where the way is direct.

        Raises:
            ConfigError: what names it is no proxy's URL, or of a sort that is not spoken.
        """
        url = self._urls.get(scheme, "")
        if not url or self._is_direct(host, port):
            return None
        return _read(url, f"{scheme.upper()}_PROXY")

    def _is_direct(self, host: str, port: int) -> bool:
        from urllib.request import proxy_bypass

        if proxy_bypass(f"[{host}]:{port}" if ":" in host else f"{host}:{port}"):
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return any(_holds(entry, address) for entry in self._direct)


def open_tunnel(connected: socket.socket, proxy: Proxy, to: str) -> None:
    """Ask *proxy* for a tunnel *to* a host and a port; what is sent next goes through it.

    Raises:
        FetchError: the proxy refuses.
        TransientError: it does not reach the host now.
        AnswerError: it answers no HTTP.
        OSError: the connection to it broke.
    """
    connected.sendall(request_head("CONNECT", to, {"Host": to, **proxy.headers}))
    answer = Answer(Inbox(PlainSocket(connected)), "CONNECT")
    if 200 <= answer.status < 300:
        if answer.is_ahead:
            raise AnswerError("more than an answer to CONNECT")
        return
    got = f"HTTP {answer.status} {answer.reason}"
    if answer.status in (429, 502, 503, 504):
        raise TransientError(
            "the proxy does not reach the host", where=f"{proxy}, on the way to {to}", got=got
        )
    raise refused_by_proxy(f"{proxy}, on the way to {to}", got)


def refused_by_proxy(where: str, got: str) -> FetchError:
    """Return the error for a proxy that does not let a request pass."""
    return FetchError(
        "the proxy refuses access",
        where=where,
        got=got,
        next_step="check the user and password in HTTPS_PROXY or HTTP_PROXY and that the proxy "
        "allows the host, or name the host in NO_PROXY",
    )


def _environment() -> Mapping[str, str]:
    """Return the proxies by scheme, as the environment has them, or else the system."""
    if sys.platform == "linux" and not any(name.lower().endswith("_proxy") for name in os.environ):
        return {}
    from urllib.request import getproxies  # http.client and email: no first request waits for them

    return getproxies()


def _holds(entry: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    try:
        return address in ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        return False


def _read(url: str, variable: str) -> Proxy:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port = None, 0
    if not host or parts.scheme != "http":
        raise ConfigError(
            "a proxy that podloader cannot use",
            where=variable,
            expected="http://host:port or http://user:password@host:port, percent-encoded",
            got=f"{parts.scheme}://…" if host else "no such URL",
            next_step="correct the variable, or name the host in NO_PROXY",
        )
    authorization = ""
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + base64.b64encode(user.encode()).decode()
    return Proxy(host, port, authorization)
