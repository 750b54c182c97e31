"""Who is there: addresses from a list, from DNS or from Ray, and which of them answer.

Nothing is elected and nobody gossips: each pod asks every address once who it is, all at the same
time, and again after it has failed. A pod that does not answer is as if it were not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from loader.errors import ConfigError
from loader.json_text import parse_json
from loader.peers.access import SENDER
from loader.ray_cluster import living_nodes

HELLO_S = 2.0  # for all of a connection and its answer
_RESOLVE_S = 2.0
_AGAIN_S = (0.5, 1.0, 2.0, 5.0, 10.0)
_REST_S = 30.0
_DOUBT_S = 10.0  # no sooner are all greeted anew
_AT_ONCE = 256
_MOST_HELLO_BYTES = 4096
_DNS, RAY = "dns", "ray"
_log = logging.getLogger("podloader")


@dataclass(slots=True)
class Member:
    """One address. ``nonce`` is its own, empty where it does not answer."""

    address: str
    nonce: str = ""
    is_shunned: bool = False
    tries: int = 0
    again_at: float = 0.0  # when it is greeted next; never while it lives
    heard_at: float = 0.0  # when it was greeted the last time
    is_doubted: bool = False  # it is greeted once more, although it lives
    is_asked: bool = False

    @property
    def is_living(self) -> bool:
        """Whether it answered, and has not failed since."""
        return bool(self.nonce) and not self.is_shunned

    @property
    def is_settled(self) -> bool:
        """Whether it is not to be greeted now, whatever the time."""
        return self.is_living or self.is_asked or self.is_shunned


def join_address(host: str, port: int | str) -> str:
    """Return what a peer is called: its host, as URLs write it, and its port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_peers(named: Sequence[str], port: int) -> tuple[str | None, tuple[str, ...]]:
    """Return the DNS name and the addresses that the setting ``peers`` gives, with their port.

    The name is ``RAY`` where Ray is to say who is there.

    Raises:
        ConfigError: one of them is no address.
    """
    if tuple(named) == (RAY,):
        return RAY, ()
    addresses, name = [], None
    for text in named:
        is_dns = text.startswith(f"{_DNS}://")
        try:
            found = urlsplit(text if is_dns else f"//{text}")
            host, own_port = found.hostname, found.port or port
        except ValueError:
            host, own_port = None, port
        if not host or found.path or found.query or found.username:
            raise ConfigError(
                "a peer that is no address",
                where="peers",
                expected="dns://<headless service>[:port], ray, or host[:port]",
                got=text,
            )
        address = join_address(host, own_port)
        if is_dns:
            if name is not None:
                raise ConfigError("two DNS names of peers", where="peers", got=", ".join(named))
            name = address
        else:
            addresses.append(address)
    return name, tuple(dict.fromkeys(addresses))


class Members:
    """The addresses of all pods, this one among them. Its coroutine runs on the server's loop.

    ``me`` is this pod's own address, None as long as it is not known to be among them.
    """

    def __init__(
        self, named: Sequence[str], port: int, own_id: str, tls: ssl.SSLContext | None
    ) -> None:
        self._name, listed = parse_peers(named, port)
        self._own_id, self._own_port = own_id, port
        self._tls = tls
        self._found = {address: Member(address) for address in listed}
        self._doubted_at = -_DOUBT_S
        self._asking: asyncio.Future[set[str]] | None = None
        self._settled = asyncio.Event()
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self.me: str | None = None

    def living(self) -> tuple[str, ...]:
        """Return the addresses that answer, with this pod's own. In any thread."""
        return tuple(m.address for m in list(self._found.values()) if m.is_living)

    def nonce(self, address: str) -> str:
        """Return what that peer signs with, empty where it does not answer."""
        member = self._found.get(address)
        return member.nonce if member is not None and member.is_living else ""

    def fail(self, address: str) -> None:
        """Take note that it does not answer; it is greeted again after a while. In any thread."""
        if (member := self._found.get(address)) is not None and member.nonce:
            member.nonce, member.tries = "", 1
            member.again_at = time.monotonic() + _AGAIN_S[1]

    def doubt(self) -> None:
        """Greet all who live once more: one is silent, and so may others be. In any thread."""
        now = time.monotonic()
        if now - self._doubted_at > _DOUBT_S:
            self._doubted_at = now
            for member in list(self._found.values()):
                member.is_doubted = member.is_living and member.address != self.me

    def is_sure(self, address: str) -> bool:
        """Return whether it has been heard since there was doubt. In any thread."""
        member = self._found.get(address)
        return member is not None and member.is_living and member.heard_at >= self._doubted_at

    def rest(self, address: str) -> None:
        """Do without it for a while: it is slow. In any thread."""
        self.fail(address)
        if (member := self._found.get(address)) is not None:
            member.again_at = time.monotonic() + _REST_S

    def shun(self, address: str) -> None:
        """Never ask it again."""
        if (member := self._found.get(address)) is not None:
            member.is_shunned = True

    def wake(self, address: str) -> None:
        """Greet *address* now, which has just greeted this pod; no other than is known."""
        member = self._found.get(address)
        if member is not None and member.again_at < time.monotonic() + _REST_S / 2:
            member.again_at = 0.0

    async def run(self) -> None:
        """Resolve and greet until cancelled."""
        resolved_at = -_RESOLVE_S
        async with asyncio.TaskGroup() as greetings:
            while True:
                now = time.monotonic()
                if self._name is not None and now - resolved_at >= _RESOLVE_S:
                    resolved_at = now
                    await self._resolve()
                for member in list(self._found.values()):
                    is_due = not member.is_settled and member.again_at <= now
                    if is_due or (member.is_doubted and not member.is_asked):
                        member.is_asked, member.is_doubted = True, False
                        greetings.create_task(self._greet(member))
                if self._found and all(m.is_living for m in self._found.values()):
                    self._settled.set()
                await asyncio.sleep(0.05)

    async def wait_settled(self, timeout_s: float) -> None:
        """Wait until every address answers, at the most so long: pods may start together."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), timeout_s)

    async def _resolve(self) -> None:
        assert self._name is not None
        host, _, port = self._name.rpartition(":")
        if self._name == RAY:
            finding, port = self._ask_ray(), str(self._own_port)
        else:
            finding = _ask_dns(host, int(port))
        try:
            hosts = await asyncio.wait_for(finding, HELLO_S)
        except (OSError, TimeoutError) as error:
            _log.debug("peers: %s cannot be resolved: %s", self._name, error)
            return
        now = {join_address(host, port) for host in hosts}
        for address in now - self._found.keys():
            self._found[address] = Member(address)
        for address in self._found.keys() - now:
            if not self._found[address].is_living:
                del self._found[address]

    async def _ask_ray(self) -> set[str]:
        """Return the addresses of its nodes; an earlier question that hangs is waited for."""
        if self._asking is None or self._asking.done():
            asking = self._asking = asyncio.get_running_loop().create_future()
            loop = asyncio.get_running_loop()

            def ask() -> None:
                found = _ray_hosts()
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(_settle, asking, found)

            # A daemon: nobody waits for it where the cluster's head is gone.
            threading.Thread(target=ask, name="peers: ray", daemon=True).start()
        return await asyncio.shield(self._asking)

    async def _greet(self, member: Member) -> None:
        try:
            async with self._slots, asyncio.timeout(HELLO_S):
                found = await self._hello(member.address)
            if found["id"] == self._own_id:
                self.me = member.address
            member.nonce, member.tries = str(found["nonce"]), 0
            member.heard_at = time.monotonic()
        except (OSError, TimeoutError, ValueError, KeyError, TypeError, EOFError):
            pause_s = _AGAIN_S[min(member.tries, len(_AGAIN_S) - 1)]
            member.nonce = ""
            member.again_at, member.tries = time.monotonic() + pause_s, member.tries + 1
        finally:
            member.is_asked = False

    async def _hello(self, address: str) -> dict[str, object]:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(
            host.strip("[]"), int(port), ssl=self._tls, limit=_MOST_HELLO_BYTES
        )
        try:
            head = f"GET /hello HTTP/1.1\r\nHost: {address}\r\n{SENDER}: {self._own_port}\r\n\r\n"
            writer.write(head.encode())
            await reader.readuntil(b"\r\n\r\n")
            body = await reader.readuntil(b"\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise ValueError("no peer") from error
        finally:
            writer.close()
        found = parse_json(body)
        if not isinstance(found, dict):
            raise ValueError("no peer")
        return found


async def _ask_dns(host: str, port: int) -> set[str]:
    loop = asyncio.get_running_loop()
    infos = await loop.getaddrinfo(host.strip("[]"), port, type=1)
    return {str(info[4][0]) for info in infos}


def _ray_hosts() -> set[str]:
    try:
        return {node.address for node in living_nodes()}
    except Exception as error:  # Ray's own, of many types
        _log.debug("peers: Ray does not say who is there: %s", error)
        return set()


def _settle(asking: asyncio.Future[set[str]], found: set[str]) -> None:
    if not asking.done():
        asking.set_result(found)
