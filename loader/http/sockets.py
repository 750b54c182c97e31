"""Sockets that bring a body's bytes at the least cost in processor time.

Chosen by measurement. Blocking sockets, the kernel's own time limit in the place of a poll before
every read; and as few reads as can be, since each wakes a thread, hands the interpreter's lock
round and acknowledges what it took: from a peer that is fast, a buffer is waited for as a whole,
and the kernel wakes the thread once, when that has come (``SO_RCVLOWAT``).

TLS: OpenSSL reads the socket itself and decrypts a whole buffer in one call (see ``openssl``). It
does not block, since OpenSSL reads on by itself until it has a record, however slowly that comes.
Where Python's ``ssl`` cannot be reached in that way: large reads of ciphertext, decrypted from
memory. That yields one record of 16 KiB at a time and Python lets go of its lock around each; many
threads that do so at once spend more on handing the lock round than on decrypting, so one thread
decrypts at a time while the others wait in ``recv``.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loader.http.openssl import Records

_MOMENT_S = 0.02  # what comes within it is waited for
_LONGEST_S = 3600.0
_PATIENCE_S = 0.1  # without a byte, before a read returns fewer than it waits for
_LEAST_BYTES = 64 << 10  # that a read waits for: a slow peer's bytes are taken as they come
_CIPHERTEXT_BYTES = 256 << 10  # of one read: what stays in a processor's cache
_CIPHERTEXTS_BYTES = 8 << 20  # of all threads' reads; OpenSSL holds as much again
_DECRYPTED_BYTES = 512 << 10  # of one read that waits: nobody sees them before they are all there
_RECORD_BYTES = 16 << 10  # TLS has no longer ones
_decrypting = threading.Lock()
_scratch = threading.local()


class PlainSocket:
    """A connected socket.

    It is blocking, and the kernel limits each wait: what Python's own time limits cost is a poll
    before every read. ``deadline``, of the monotonic clock, is for all waits until it is moved.
    """

    _timeout_s: float | None

    def __init__(self, sock: socket.socket) -> None:
        self.deadline = math.inf
        self._sock = sock
        self._lock = threading.Lock()
        self._holders = 0
        self._closed = False
        self._due_bytes = 0  # within the next moment
        self._read_at = time.monotonic()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self.settimeout(sock.gettimeout())

    def recv_into(self, buffer: memoryview, /) -> int:
        """Like ``recv_some``, but may block until the buffer is full (SO_RCVLOWAT).

        From a peer that is fast, so many are waited for as are due within a moment.
        """
        due = min(self._due_bytes, len(buffer))
        count = self._fill(buffer, due) if due >= _LEAST_BYTES else self.recv_some(buffer)
        now = time.monotonic()
        self._due_bytes = int(count * _MOMENT_S / max(now - self._read_at, 1e-6))
        self._read_at = now
        return count

    def recv_some(self, buffer: memoryview, /) -> int:
        """Put into *buffer* what has come; wait where that is nothing. Raises TimeoutError."""
        return int(self._wait_for(self._sock.recv_into, buffer))

    def peek(self) -> bytes | None:
        """Return one of the bytes that have come, none at the end; None where nothing has come.

        After the former two the connection is of no use any more.
        """
        if not self._poll.poll(0):
            return None
        try:
            return self._sock.recv(1, socket.MSG_PEEK)
        except OSError:
            return b""

    def begin_time(self, limit_s: float | None = None) -> None:
        """Let all waits from now on take no longer together than one may, or than *limit_s*."""
        limit_s = limit_s or self._timeout_s
        self.deadline = time.monotonic() + limit_s if limit_s else math.inf

    def _fill(self, buffer: memoryview, due: int) -> int:
        """Sleep until as many as are *due* have come, or the peer pauses; take what is there."""
        self._sleep_until(due)
        return self.recv_some(buffer)

    def _sleep_until(self, due: int) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, due)
        self._poll.poll(_PATIENCE_S * 1000)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)  # else heads wait for it

    def _wait_for(self, act: Callable[..., Any], *arguments: Any) -> Any:
        """Do *act*, again while the peer's silence is not too long, and return its result."""
        now = time.monotonic()
        until = min(now + (self._timeout_s or math.inf), self.deadline)
        if now > until:  # a peer that is never silent for long
            raise TimeoutError
        while True:
            try:
                return act(*arguments)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                self._await(until, for_writing=isinstance(error, ssl.SSLWantWriteError))
            except ssl.SSLSyscallError:
                raise ConnectionResetError from None

    def _await(self, until: float, *, for_writing: bool) -> None:
        """Wait for the peer. Raises TimeoutError; here the kernel has waited already."""
        if time.monotonic() > until - _PATIENCE_S / 2:
            raise TimeoutError

    def sendall(self, data: bytes) -> None:
        """Send all of *data*."""
        try:
            self._sock.sendall(data)
        except BlockingIOError:
            raise TimeoutError from None

    def settimeout(self, timeout_s: float | None) -> None:
        """Limit each wait for the peer."""
        self._timeout_s = timeout_s
        self._sock.settimeout(None)
        set_kernel_timeouts(
            self._sock, min(timeout_s or _PATIENCE_S, _PATIENCE_S), timeout_s or 0.0
        )

    def getpeername(self) -> Any:
        """Return the address of the other end."""
        return self._sock.getpeername()

    def shutdown(self, how: int) -> None:
        """End the connection: a thread that waits in it wakes."""
        self._sock.shutdown(how)

    def hold(self) -> None:
        """Keep it open until it is let go of: no thread's read may meet another's descriptor.

        OpenSSL knows its descriptor by the number alone, which the next connection may have.

        Raises:
            ConnectionAbortedError: another thread has closed it.
        """
        with self._lock:
            if self._closed and not self._holders:
                raise ConnectionAbortedError
            self._holders += 1

    def let_go(self) -> None:
        """Note that it is not needed any more."""
        with self._lock:
            self._holders -= 1
            self._drop_if_unused()

    def close(self) -> None:
        """Close, once nobody holds it."""
        with self._lock:
            self._closed = True
            self._drop_if_unused()

    def _drop_if_unused(self) -> None:
        if self._closed and self._holders <= 0:
            self._sock.close()


class TlsSocket(PlainSocket):
    """A TLS client over a connected socket that OpenSSL reads itself."""

    def __init__(self, sock: socket.socket, tls: ssl.SSLObject, records: Records) -> None:
        super().__init__(sock)
        self._tls = tls
        self._records = records
        self.begin_time()
        self._wait_for(tls.do_handshake)
        self.deadline = math.inf

    def settimeout(self, timeout_s: float | None) -> None:
        """Limit each wait for the peer."""
        self._timeout_s = timeout_s
        self._sock.setblocking(False)

    def peek(self) -> bytes | None:
        """Return one decrypted byte that has come, none at the end; None where nothing has come."""
        return _read_one(self._tls)

    def recv_some(self, buffer: memoryview, /) -> int:
        """Put into *buffer* what has come; 0 where the peer has ended the connection."""
        try:
            return int(self._wait_for(self._tls.read, len(buffer), buffer))
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return 0  # whoever expects more bytes sees that they are missing

    def sendall(self, data: bytes) -> None:
        """Send all of *data*."""
        self._wait_for(self._tls.write, data)

    def _fill(self, buffer: memoryview, due: int) -> int:
        buffer = buffer[: min(due, _DECRYPTED_BYTES)]
        count = self._records.read(buffer)
        if len(buffer) - count > _RECORD_BYTES:
            self._sleep_until(len(buffer) - count)
            count += self._records.read(buffer[count:])
        return count or self.recv_some(buffer)

    def _await(self, until: float, *, for_writing: bool) -> None:
        self._poll.modify(self._sock, select.POLLOUT if for_writing else select.POLLIN)
        left_s = until - time.monotonic()
        ready = left_s > 0 and self._poll.poll(min(left_s, _LONGEST_S) * 1000)
        self._poll.modify(self._sock, select.POLLIN)
        if not ready:
            raise TimeoutError


class BufferedTlsSocket(PlainSocket):
    """A TLS client over a connected socket, for any Python."""

    def __init__(
        self,
        sock: socket.socket,
        tls: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
    ) -> None:
        super().__init__(sock)
        self._tls = tls
        self._incoming, self._outgoing = incoming, outgoing
        self._dry = False  # nothing left to decrypt before more is received
        self.begin_time()
        self._handshake()
        self.deadline = math.inf

    def peek(self) -> bytes | None:
        """Return one decrypted byte that has come, none at the end; None where nothing has come."""
        try:
            data = self._sock.recv(_RECORD_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return _read_one(self._tls)
        except OSError:
            return b""
        self._incoming.write(data)
        return _read_one(self._tls) if data else b""

    def recv_into(self, buffer: memoryview, /) -> int:
        """Wait for bytes and put them into *buffer*; 0 where the peer has ended the connection."""
        return self.recv_some(buffer)

    def recv_some(self, buffer: memoryview, /) -> int:
        """Wait for a record, decrypt what has come into *buffer*; 0 where the peer has ended it."""
        while True:
            if self._dry:
                self._receive()
            with _decrypting:
                count = self._decrypt(buffer)
            self._dry = count is None or count < len(buffer)
            if count is not None:
                return count

    def sendall(self, data: bytes) -> None:
        """Send all of *data*."""
        self._tls.write(data)
        self._flush()

    def _handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._receive()
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._flush()  # the alert that tells the peer why
                raise
        self._flush()

    def _decrypt(self, buffer: memoryview) -> int | None:
        """Return how many bytes were put into *buffer*, None where more has to be received."""
        count = 0
        try:
            while count < len(buffer):
                got = self._tls.read(min(len(buffer) - count, _RECORD_BYTES), buffer[count:])
                if not got:
                    break
                count += int(got)
        except ssl.SSLWantReadError:
            if not count:
                return None
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            pass  # whoever expects more bytes sees that they are missing
        return count

    def _receive(self) -> None:
        buffer = _ciphertext_buffer()
        count = super().recv_some(buffer)
        if count:
            self._incoming.write(buffer[:count])
        else:
            self._incoming.write_eof()
        if self._outgoing.pending:
            self._flush()

    def _flush(self) -> None:
        if data := self._outgoing.read():
            super().sendall(data)


def shake_hands(
    sock: socket.socket, context: ssl.SSLContext, host: str, *, openssl_reads: bool = True
) -> PlainSocket:
    """Return the TLS client over *sock* that *host* proved itself to."""
    from loader.http.openssl import attach  # ctypes, for which plain HTTP should not wait

    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=host)
    records = attach(tls, incoming, outgoing, sock.fileno()) if openssl_reads else None
    if records is None:
        return BufferedTlsSocket(sock, tls, incoming, outgoing)
    return TlsSocket(sock, tls, records)


def _read_one(tls: ssl.SSLObject) -> bytes | None:
    """Return the next byte, none at the end, None where it has not come."""
    try:
        return tls.read(1)
    except ssl.SSLWantReadError:  # at most a ticket for another session has come
        return None
    except OSError:
        return b""


def set_kernel_timeouts(sock: socket.socket, receive_s: float, send_s: float) -> None:
    """Let the kernel limit each receive and send of a blocking socket; 0 for no limit."""
    for option, seconds in ((socket.SO_RCVTIMEO, receive_s), (socket.SO_SNDTIMEO, send_s)):
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, option, limit)


def _ciphertext_buffer() -> memoryview:
    """Return this thread's buffer: a connection keeps nothing in it between two reads.

    The more threads there are, the less of it is used, and ever in memory.
    """
    buffer: memoryview | None = getattr(_scratch, "buffer", None)
    if buffer is None:
        buffer = _scratch.buffer = memoryview(mmap.mmap(-1, _CIPHERTEXT_BYTES))
    share = max(_CIPHERTEXTS_BYTES // threading.active_count(), _RECORD_BYTES)
    return buffer[:share]
