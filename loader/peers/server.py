"""Serves chunks to other pods: from this disk, or out of memory while they come.

::

    GET /hello                        who this is, and the nonce that requests are signed with
    GET /objects/<object>/<number>    a chunk, whole; see ``access`` for the headers
        ?held                         only where it is here, or coming
    GET /objects/<object>/<number>/sum       what it sums up to, when it is whole
    GET /objects/<object>/<number>/holders   other pods that have it from here, by commas

    200  the bytes, with Podloader-Sum where it is known before they come
    503  ask again: it will come, there is no room for it now, or this pod is busy
    401  not signed as it has to be     404  not here
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import ssl
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from http import HTTPStatus
from urllib.parse import urlsplit

from loader.http.grammar import AnswerError, Asking, read_request
from loader.peers.access import ASK, PROOF, SENDER, Token
from loader.peers.chunks import Chunk, SharedObject
from loader.peers.flights import Flight
from loader.peers.held import Held
from loader.peers.members import join_address

SUM = "Podloader-Sum"
_IDLE_S = 60.0  # of a kept connection
_HEAD_S = 5.0
_MOST_HEAD_BYTES = 8192
_MOST_CONNECTIONS = 400
_MOST_UPLOADS = 16
_SENT_BYTES = 1 << 20
_MOST_HOLDERS = 4
_MOST_REMEMBERED = 4096
_YOUNG_S = 2.0
_WAIT_S = 1.0  # for something to say; a pod that is silent for two seconds counts as dead


class ChunkServer:
    """One pod's server; its coroutines run on one loop.

    *find_held* and *find_flight* look for a chunk on the disk and in memory; *start_flight* lets it
    be fetched from the origin, and returns None where there is no room. *wake* is told who greets.
    """

    def __init__(
        self,
        own_id: str,
        nonce: str,
        token: Token,
        find_object: Callable[[str], SharedObject | None],
        find_held: Callable[[Chunk], Held | None],
        find_flight: Callable[[Chunk], Flight | None],
        start_flight: Callable[[Chunk], Flight | None],
        wake: Callable[[str], None],
        *,
        bytes_per_s: int = 0,
    ) -> None:
        self._hello = json.dumps({"id": own_id, "nonce": nonce}).encode() + b"\n"
        self._nonce = nonce
        self._token = token
        self._find_object = find_object
        self._find_held = find_held
        self._find_flight = find_flight
        self._start_flight = start_flight
        self._wake = wake
        self._bytes_per_s = bytes_per_s
        self._uploads = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._free_at = 0.0  # when the next byte may be sent
        self._holders: OrderedDict[str, deque[str]] = OrderedDict()
        self._began = math.inf
        self.uploaded_bytes = 0

    async def listen(
        self, port: int, tls: ssl.SSLContext | None, host: str | None = None
    ) -> asyncio.Server:
        """Listen on *port* of *host*, or of every address. Raises OSError."""
        self._began = asyncio.get_running_loop().time()
        return await asyncio.start_server(
            self._let_in, host, port, ssl=tls, limit=_MOST_HEAD_BYTES, backlog=1024
        )

    @property
    def writers(self) -> tuple[asyncio.StreamWriter, ...]:
        """The connections that are open."""
        return tuple(self._writers)

    async def drop(self, writers: Sequence[asyncio.StreamWriter]) -> None:
        """Drop connections, when nobody is let in any more and no task is left of them."""
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0.01)  # a transport's socket is closed a turn later

    def _let_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        task = asyncio.get_running_loop().create_task(self._converse(reader, writer))
        task.add_done_callback(lambda _: self._writers.discard(writer))

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            wait_s = _HEAD_S
            while len(self._writers) <= _MOST_CONNECTIONS:
                async with asyncio.timeout(wait_s):
                    text = await reader.readuntil(b"\r\n\r\n")
                wait_s = _IDLE_S
                if not await self._answer(read_request(text), writer):
                    break
                await writer.drain()
        except (OSError, TimeoutError, EOFError, AnswerError, asyncio.LimitOverrunError):
            pass
        except asyncio.CancelledError:
            pass  # at the end of all; asyncio's streams would show it
        finally:
            writer.close()

    async def _answer(self, asking: Asking, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return whether the connection bears another one."""
        if asking.method != "GET" or asking.has_body:
            _write(writer, HTTPStatus.METHOD_NOT_ALLOWED)
            return False
        if asking.target == "/hello":
            _write(writer, HTTPStatus.OK, self._hello)
            host, port = writer.get_extra_info("peername")[0], asking.fields.get(SENDER.lower(), "")
            self._wake(join_address(host, port))
            return True
        own = self._token.may_ask(asking.fields.get(ASK.lower(), ""), self._nonce, asking.target)
        if own is None:
            _write(writer, HTTPStatus.UNAUTHORIZED)
            return True

        def sign(digest: str) -> dict[str, str]:
            proof = self._token.prove(self._nonce, own, asking.target, digest)
            return {SUM: digest, PROOF: proof}

        place = urlsplit(asking.target)
        chunk, rest = self._find_chunk(place.path)
        if chunk is None:  # a pod that has just started may not know its objects yet
            young = asyncio.get_running_loop().time() - self._began < _YOUNG_S
            young &= place.query != "held"
            status = HTTPStatus.SERVICE_UNAVAILABLE if young else HTTPStatus.NOT_FOUND
            _write(writer, status, headers=sign(""))
            return True
        if rest == "sum":
            return await self._tell_sum(chunk, sign, writer)
        if rest == "holders":
            holders = ",".join(self._holders.get(chunk.name, ())).encode()
            _write(writer, HTTPStatus.OK, holders, headers=sign(""))
            return True
        sender = asking.fields.get(SENDER.lower(), "")
        return await self._give(chunk, place.query == "held", sender, sign, writer)

    def _find_chunk(self, path: str) -> tuple[Chunk | None, str]:
        match path.split("/"):
            case ["", "objects", name, number, *rest] if number.isascii() and number.isdigit():
                found = self._find_object(name)
                if found is not None and len(number) < 10:
                    chunk = found.chunk(int(number))
                    if chunk.size_bytes > 0:
                        return chunk, "/".join(rest)
        return None, ""

    async def _tell_sum(
        self, chunk: Chunk, sign: Callable[[str], dict[str, str]], writer: asyncio.StreamWriter
    ) -> bool:
        flight = self._find_flight(chunk)
        if flight is not None and not flight.is_over:
            await _changes(flight, _WAIT_S)
        crc = flight.crc if flight is not None else None
        if crc is None and (held := await asyncio.to_thread(self._find_held, chunk)):
            os.close(held.fd)
            crc = held.crc
        if crc is None:
            _write(writer, HTTPStatus.SERVICE_UNAVAILABLE, headers=sign(""))
        else:
            _write(writer, HTTPStatus.OK, headers=sign(f"{crc:016x}"))
        return True

    async def _give(
        self,
        chunk: Chunk,
        held_only: bool,
        sender: str,
        sign: Callable[[str], dict[str, str]],
        writer: asyncio.StreamWriter,
    ) -> bool:
        flight, held = self._find_flight(chunk), None
        if flight is None or not flight.is_whole:
            held = await asyncio.to_thread(self._find_held, chunk)
        if flight is not None and not flight.is_coming:
            flight.is_promoted |= not held_only
            flight = None if held_only else flight
        if held is None and flight is None and not held_only:
            flight = self._start_flight(chunk)
        if held is None and flight is None and held_only:
            _write(writer, HTTPStatus.NOT_FOUND, headers=sign(""))
            return True
        if self._uploads >= _MOST_UPLOADS or (held is None and flight is None):
            if held is not None:
                os.close(held.fd)
            _write(writer, HTTPStatus.SERVICE_UNAVAILABLE, headers=sign(""))
            return True
        self._uploads += 1
        try:
            if held is not None:
                whole = await self._send_held(chunk, held, sign, writer)
            else:
                assert flight is not None
                whole = await self._relay(flight, sign, writer)
        finally:
            self._uploads -= 1
        if whole and sender:
            self._holders.setdefault(chunk.name, deque(maxlen=_MOST_HOLDERS)).append(sender)
            if len(self._holders) > _MOST_REMEMBERED:
                self._holders.popitem(last=False)
        return whole

    async def _send_held(
        self,
        chunk: Chunk,
        held: Held,
        sign: Callable[[str], dict[str, str]],
        writer: asyncio.StreamWriter,
    ) -> bool:
        with os.fdopen(held.fd, "rb", buffering=0) as file:
            headers = sign(f"{held.crc:016x}")
            _write(writer, HTTPStatus.OK, size_bytes=chunk.size_bytes, headers=headers)
            await writer.drain()
            place, loop = chunk.start, asyncio.get_running_loop()
            while place < chunk.end:
                count = min(_SENT_BYTES, chunk.end - place)
                await self._pace(count)
                if await loop.sendfile(writer.transport, file, place, count) != count:
                    return False  # the file became shorter
                place += count
        return True

    async def _relay(
        self,
        flight: Flight,
        sign: Callable[[str], dict[str, str]],
        writer: asyncio.StreamWriter,
    ) -> bool:
        if not flight.readable and not flight.is_over:
            await _changes(flight, _WAIT_S)
            if not flight.readable and not flight.is_over:
                _write(writer, HTTPStatus.SERVICE_UNAVAILABLE, headers=sign(""))
                return True
        if flight.error is not None:
            _write(writer, HTTPStatus.NOT_FOUND, headers=sign(""))
            return True
        headers = sign(f"{flight.crc:016x}" if flight.crc is not None else "")
        size_bytes = flight.chunk.size_bytes
        _write(writer, HTTPStatus.OK, size_bytes=size_bytes, headers=headers)
        async for piece in _pieces(flight):
            await self._pace(len(piece))
            writer.write(piece)
            await writer.drain()
        return flight.error is None

    async def _pace(self, count: int) -> None:
        """Wait until so many bytes may be sent."""
        self.uploaded_bytes += count
        if not self._bytes_per_s:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + count / self._bytes_per_s
        await asyncio.sleep(self._free_at - now)


async def _pieces(flight: Flight) -> AsyncIterator[memoryview]:
    """Yield the flight's bytes as they come, until all are there or it fails."""
    place, data = 0, memoryview(flight.data)
    while place < len(data) and flight.error is None:
        if flight.readable == place:
            await _changes(flight, None)
            continue
        piece = data[place : min(flight.readable, place + _SENT_BYTES)]
        yield piece
        place += len(piece)


async def _changes(flight: Flight, timeout_s: float | None) -> None:
    """Wait until the flight has changed, for so long at the most."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def listener() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(changed.set)

    before = flight.readable
    flight.listen(listener)
    try:
        if flight.readable == before and not flight.is_over:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), timeout_s)
    finally:
        flight.unlisten(listener)


def _write(
    writer: asyncio.StreamWriter,
    status: HTTPStatus,
    body: bytes = b"",
    *,
    size_bytes: int | None = None,
    headers: dict[str, str] | None = None,
) -> None:
    """Write a head, and *body*; *size_bytes* is of one that the caller writes."""
    length = len(body) if size_bytes is None else size_bytes
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items() if value]
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
