"""Which proxy leads to a host, what it refuses, and what it passes on."""

from __future__ import annotations

import random
import socket
from contextlib import closing
from pathlib import Path

import pytest

from loader.errors import ConfigError, FetchError, TransientError
from loader.fetch.snapshot import FetchOptions, fetch
from loader.http.body import InFlight
from loader.http.client import HttpClient, HttpOptions
from loader.http.connection import Connection
from loader.http.proxies import Proxies
from loader.http.request import Origin, Request, write_message
from loader.http.sockets import PlainSocket
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest
from tests.origin import FaultyOrigin
from tests.stores.proxy import PlainProxy, Proxy

CONTENT = random.Random(5).randbytes(6_000_005)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("direct", "host", "goes_direct"),
    [
        ("", "h.test", False),
        ("*", "h.test", True),
        ("h.test", "h.test", True),
        (".test", "h.test", True),
        ("other.test,h.test:443", "h.test", True),
        ("h.test:444", "h.test", False),
        ("10.0.0.0/8, 192.168.1.7", "10.1.2.3", True),
        ("10.0.0.0/8, 192.168.1.7", "192.168.1.7", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/8", "h.test", False),
        ("::1", "::1", True),
        ("[::1]", "::1", True),
        ("fd00::/8", "fd00::7", True),
    ],
)
def test_hosts_that_are_reached_without(
    direct: str, host: str, goes_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.test:3128")
    monkeypatch.setenv("NO_PROXY", direct)
    assert (Proxies().find("https", host, 443) is None) is goes_direct


def test_the_port_is_that_of_http_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("http://proxy.test", "proxy.test:80", "http://proxy.test:80/"):
        monkeypatch.setenv("HTTP_PROXY", url)
        proxy = Proxies().find("http", "h.test", 80)
        assert proxy is not None
        assert (proxy.host, proxy.port, proxy.headers) == ("proxy.test", 80, {})


@pytest.mark.parametrize(
    ("url", "got"),
    [
        ("socks5://user:S3CR3T@127.0.0.1:1080", "socks5://…"),
        ("https://user:S3CR3T@127.0.0.1:3128", "https://…"),
        ("http://user:S3CR3T@127.0.0.1:port", "no such URL"),
        ("http://user:S3/CR3T@127.0.0.1:3128", "no such URL"),
        ("http://[::1", "no such URL"),
        ("http://", "no such URL"),
    ],
)
def test_what_is_no_proxy(url: str, got: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", url)
    with closing(HttpClient(HttpOptions())) as client, pytest.raises(ConfigError) as caught:
        client.get("https://storage.test/x")
    assert caught.value.where == "HTTPS_PROXY"
    assert caught.value.got == got
    assert "CR3T" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "kind"), [(407, FetchError), (403, FetchError), (502, TransientError)]
)
def test_a_tunnel_that_is_refused(
    status: int, kind: type[FetchError], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(9, refusal=status)
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:S3CR3T@{proxy.address}")
    with closing(HttpClient(HttpOptions())) as client, pytest.raises(FetchError) as caught:
        client.get("https://storage.test/x?Signature=S3CR3T")
    proxy.stop()
    assert type(caught.value) is kind
    assert caught.value.where == f"the proxy {proxy.address}, on the way to storage.test:443"
    assert caught.value.got.startswith(f"HTTP {status} ")
    assert "S3CR3T" not in str(caught.value)


def test_no_secret_in_a_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://user:S3CR3T@proxy.test:3128")
    proxy = Proxies().find("http", "h.test", 80)
    origin = Origin("http", "h.test", 80, proxy)
    request = Request("POST", {"Authorization": "Api-Key S3CR3T"}, b"S3CR3T")
    url = "http://h.test/x?Signature=S3CR3T"
    message = write_message(request, origin, "/x?Signature=S3CR3T", url)
    connection = Connection(PlainSocket(socket.socket()))
    for value in (origin, request, InFlight(connection, origin, url, message, is_kept=False)):
        shown = f"{value!r} {value}"
        assert "S3CR3T" not in shown
        assert "dXNlcjpTM0NSM1Q" not in shown
    connection.close()


def test_a_plain_request_that_the_proxy_refuses(
    origin: FaultyOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{origin.server_port}")
    monkeypatch.setattr(
        origin.RequestHandlerClass, "do_GET", lambda handler: handler.refuse(407, "", "")
    )
    with closing(HttpClient(HttpOptions())) as client, pytest.raises(FetchError) as caught:
        client.get("http://storage.test/x")
    assert caught.value.what == "the proxy refuses access"


def test_a_proxy_is_not_asked_for_the_machines_own_link(
    origin: FaultyOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = PlainProxy(origin.server_port)
    monkeypatch.setenv("HTTP_PROXY", f"http://{proxy.address}")
    for host in ("169.254.169.254", "169。254。169。254", "169%2e254%2e169%2e254"):
        with closing(HttpClient(HttpOptions())) as client, pytest.raises(FetchError, match="link"):
            client.get(f"http://{host}/x")
    proxy.stop()
    assert not proxy.asked


def test_a_proxy_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", f"http://user:S3CR3T@127.0.0.1:{port}")
        with closing(HttpClient(HttpOptions())) as client, pytest.raises(TransientError) as caught:
            client.get(f"{scheme}://storage.test/x")
        assert caught.value.got == f"on the way through the proxy 127.0.0.1:{port}"


def test_the_tunnel_to_an_address_of_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy(9, refusal=403)
    monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
    with closing(HttpClient(HttpOptions())) as client, pytest.raises(FetchError):
        client.get("https://[2001:db8::7]:8443/x")
    proxy.stop()
    assert proxy.asked == [("[2001:db8::7]:8443", None)]


def test_a_fetch_through_a_plain_proxy(
    origin: FaultyOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = PlainProxy(origin.server_port)
    monkeypatch.setenv("HTTP_PROXY", f"http://user:S3CR3T@{proxy.address}")
    path = origin.put("x", CONTENT).relative_to(origin.root).as_posix()
    url = origin.sign(path).replace("127.0.0.1", "storage.test")
    artifact = Artifact("job1", 0, "x", url, len(CONTENT))
    options = FetchOptions(concurrency=2, retries=0, range_bytes=1 << 20)
    with closing(PresignedStore(HttpClient(HttpOptions(stall_timeout_s=5)))) as store:
        snapshot = fetch(Manifest((artifact,)), tmp_path, store, options)
    assert (tmp_path / artifact.path).read_bytes() == CONTENT
    assert snapshot.fetched_bytes == len(CONTENT)
    proxy.stop()
    assert {who for _, who in proxy.asked} == {"Basic dXNlcjpTM0NSM1Q="}
