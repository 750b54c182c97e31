"""Files that are at the origin, for good or for now, read by ranges."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from loader.errors import FormatError
from loader.fetch.arrivals import Arrivals
from loader.weights.byte_files import read_descriptor

BLOCK_BYTES = 1 << 18  # what small reads, of headers and directories, are rounded up to
_BLOCKS = 8


class RemoteFile:
    """A ``ByteFile`` at an origin, of which *read* fills a buffer from a place on.

    Small reads come out of blocks, the last few of which stay.
    """

    def __init__(
        self,
        where: str,
        size_bytes: int,
        read: Callable[[int, memoryview], None],
        *,
        digest: str | None = None,
        has_ranges: bool = True,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.where, self.size_bytes = where, size_bytes
        self.digest, self.has_ranges = digest, has_ranges
        self._read, self._block_bytes = read, block_bytes
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill *buffer* from *start* on; asked again where the connection fails.

        Raises:
            FormatError: the file ends before.
            FetchError: the origin does not give the bytes, or the object changed.
        """
        if start + len(buffer) > self.size_bytes:
            raise FormatError(
                "a file that ends too early",
                where=self.where,
                expected=f"{start + len(buffer)} bytes",
                got=f"{self.size_bytes} bytes",
            )
        if len(buffer) >= self._block_bytes:
            self._read(start, buffer)
            return
        done = 0
        while done < len(buffer):
            number, offset = divmod(start + done, self._block_bytes)
            piece = self._block(number)[offset : offset + len(buffer) - done]
            buffer[done : done + len(piece)] = piece
            done += len(piece)

    def _block(self, number: int) -> bytes:
        """Return a block; of threads that want it at the same time one reads it."""
        with self._lock:
            mine = number not in self._blocks
            block = self._blocks.setdefault(number, Future())
            self._blocks.move_to_end(number)
            while len(self._blocks) > _BLOCKS:
                self._blocks.popitem(last=False)
        if mine:
            try:
                start = number * self._block_bytes
                content = bytearray(min(self._block_bytes, self.size_bytes - start))
                self._read(start, memoryview(content))
                block.set_result(bytes(content))
            except BaseException as error:
                with self._lock:
                    self._blocks.pop(number, None)
                block.set_exception(error)
        return block.result()

    def descriptor(self, start: int, end: int) -> None:
        """Return None: it is on no disk here."""

    def close(self) -> None:
        """Do nothing: what is open is the store's."""


class ArrivingFile:
    """A ``ByteFile`` that is being fetched: large reads wait for their bytes, small ones do not."""

    def __init__(self, remote: RemoteFile, arrivals: Arrivals) -> None:
        self.where, self.size_bytes = remote.where, remote.size_bytes
        self.digest = remote.digest
        self._remote, self._arrivals = remote, arrivals
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill *buffer* from *start* on.

        Raises:
            FormatError: the file ends before.
            LoaderError: the fetch failed.
        """
        end = start + len(buffer)
        is_small = len(buffer) < BLOCK_BYTES or end > self.size_bytes
        is_here = self._arrivals.has_range(self.where, start, end)
        if is_small and self._remote.has_ranges and not is_here:
            self._remote.read_into(start, buffer)
        else:
            read_descriptor(self.descriptor(start, end), start, buffer, self.where)

    def descriptor(self, start: int, end: int) -> int:
        """Return a descriptor of the file, of which these bytes have come. Raises as a fetch."""
        self._arrivals.wait_for_range(self.where, start, end)
        with self._lock:
            if self._descriptor is None:
                self._descriptor = self._arrivals.open(self.where)
            return self._descriptor

    def close(self) -> None:
        """Close it."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
