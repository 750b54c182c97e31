"""OpenSSL's own reads of a connection's socket, many records in one call.

Python's ``ssl`` yields one record of 16 KiB a call and hands the interpreter's lock round for each.
``BIO_f_buffer`` over ``BIO_f_ssl``, asked for more than the former holds, reads on until it has
all of it (OpenSSL's ``crypto/bio/bf_buff.c``): one call, without the lock, for as many records.

The connection's ``SSL*`` is a field of CPython's object (``PySSLSocket`` in ``Modules/_ssl.c``), at
the same place in all of ``_PYTHONS``. OpenSSL's functions are asked of ``_ssl``'s own file, so that
they are those of the library it is linked with. Where either is not as known, ``ssl`` reads alone:
see ``sockets``. So it does where the setting ``openssl_reads`` is off.

SAFETY: before OpenSSL is given that pointer, it is proved to be one, for each connection and
without following it. The field lies within the object, by its type's own size, so reading it cannot
fail. What it leads to is copied by the kernel (``write`` to a pipe, which answers EFAULT where no
memory is), and has to hold the two ``BIO*`` that this connection was made with, one behind the
other: OpenSSL keeps them so in the first bytes of every ``SSL`` (``rbio``, ``wbio``).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import ssl
import struct
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

_READ_BYTES = 64 << 10  # of one read of the socket; freed while there is nothing in it
_POINTER_BYTES = ctypes.sizeof(ctypes.c_void_p)
_HEAD_BYTES = 2 * _POINTER_BYTES  # of every object; more where Python is built without its lock
_SSL_FIELD = _HEAD_BYTES + _POINTER_BYTES  # behind a weak reference
_BIO_FIELD = _HEAD_BYTES  # of PySSLMemoryBIO
_SSL_BYTES = 512  # of an SSL, which is longer: both of its BIO* are among them
_PYTHONS = ((3, 11), (3, 15))  # from the first to below the second
_CHEAPEST = "TLS_AES_128_GCM_SHA256"  # 10 rounds a block where AES-256, first by default, has 14
_SET_SSL = 109  # BIO_C_SET_SSL, openssl/bio.h
_NO_CLOSE = 0
_P, _INT, _LONG, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_size_t
_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # what is returned, and the arguments
    "OpenSSL_version_num": (ctypes.c_ulong,),
    "ERR_clear_error": (None,),
    "SSL_get_fd": (_INT, _P),
    "SSL_set_fd": (_INT, _P, _INT),
    "SSL_set_read_ahead": (None, _P, _INT),
    "SSL_set_default_read_buffer_len": (None, _P, _SIZE),
    "SSL_set_ciphersuites": (_INT, _P, ctypes.c_char_p),
    "SSL_set_quiet_shutdown": (None, _P, _INT),
    "BIO_f_buffer": (_P,),
    "BIO_f_ssl": (_P,),
    "BIO_new": (_P, _P),
    "BIO_push": (_P, _P, _P),
    "BIO_ctrl": (_LONG, _P, _INT, _LONG, _P),
    "BIO_read": (_INT, _P, _P, _INT),
    "BIO_free_all": (None, _P),
}


class Records:
    """The records that come in on a descriptor. One thread reads at a time."""

    def __init__(self, tls: ssl.SSLObject, lib: SimpleNamespace, pointer: int) -> None:
        self._tls = tls  # it owns what the pointer leads to
        self._lib = lib
        self._free: Callable[[int], None] = lib.BIO_free_all
        source = lib.BIO_new(lib.BIO_f_ssl())
        lib.BIO_ctrl(source, _SET_SSL, _NO_CLOSE, pointer)
        self._chain: int = lib.BIO_push(lib.BIO_new(lib.BIO_f_buffer()), source)

    def __del__(self) -> None:
        self._free(self._chain)

    def read(self, buffer: memoryview) -> int:
        """Fill *buffer*, larger than a record, and return how much of it; 0 after a failure.

        What failed is told by the next read of ``ssl``.
        """
        place = ctypes.c_char.from_buffer(buffer)
        count = self._lib.BIO_read(self._chain, ctypes.addressof(place), len(buffer))
        if count < len(buffer):
            self._lib.ERR_clear_error()
        return int(max(count, 0))


def attach(
    tls: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, fd: int
) -> Records | None:
    """Let *tls*, before its handshake, read from and write to *fd*, not *incoming* and *outgoing*.

    None, and nothing is changed, where this Python's ``ssl`` does not let itself be reached.
    """
    lib = _library()
    if lib is None:
        return None
    pointer = _find_ssl(tls._sslobj, incoming, outgoing)  # type: ignore[attr-defined]
    if pointer is None or lib.SSL_get_fd(pointer) != -1 or not lib.SSL_set_fd(pointer, fd):
        return None
    lib.SSL_set_read_ahead(pointer, 1)
    lib.SSL_set_default_read_buffer_len(pointer, _READ_BYTES)
    allowed = [c["name"] for c in tls.context.get_ciphers() if c["protocol"] == "TLSv1.3"]
    if _CHEAPEST in allowed:
        suites = ":".join(sorted(allowed, key=lambda name: name != _CHEAPEST))
        lib.SSL_set_ciphersuites(pointer, suites.encode())
    lib.SSL_set_quiet_shutdown(pointer, 1)  # freeing sends nothing: the socket may be closed
    return Records(tls, lib, pointer)


def _find_ssl(inner: object, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> int | None:
    """Return the ``SSL*`` of *inner*, proved as the module's SAFETY says; None where it is not."""
    pointer = _read_field(inner, _SSL_FIELD)
    ends = struct.pack("PP", _read_field(incoming, _BIO_FIELD), _read_field(outgoing, _BIO_FIELD))
    return pointer if pointer and any(ends) and ends in copy_memory(pointer, _SSL_BYTES) else None


def _read_field(of: object, offset: int) -> int:
    """Return the pointer at *offset* of an object, 0 where the object ends before."""
    if offset + _POINTER_BYTES > type(of).__basicsize__:
        return 0
    return _P.from_address(id(of) + offset).value or 0


def copy_memory(address: int, size_bytes: int) -> bytes:
    """Return this process's bytes at *address*, fewer or none where it has no memory there."""
    with contextlib.suppress(OSError):
        read_end, write_end = os.pipe()
        try:
            write = ctypes.CDLL(None).write
            write.restype, write.argtypes = ctypes.c_ssize_t, (_INT, _P, _SIZE)
            count = write(write_end, address, size_bytes)
            return os.read(read_end, size_bytes) if count > 0 else b""
        finally:
            os.close(read_end)
            os.close(write_end)
    return b""


@functools.cache
def _library() -> SimpleNamespace | None:
    """Return the functions of the library that ``ssl`` is linked with, None where unknown."""
    import _ssl

    known = sys.implementation.name == "cpython" and _PYTHONS[0] <= sys.version_info < _PYTHONS[1]
    if not known or object.__basicsize__ != _HEAD_BYTES:
        return None
    lib = SimpleNamespace()
    with contextlib.suppress(OSError, AttributeError):
        linked = ctypes.CDLL(_ssl.__file__)
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(linked, name)
            function.restype, function.argtypes = result, arguments
            setattr(lib, name, function)
        if lib.OpenSSL_version_num() == ssl.OPENSSL_VERSION_NUMBER:
            return lib
    return None
