"""Bodies of the Hub's large files, in order, of which several ranges are on their way at once.

huggingface-hub reads a file by one request, or by Xet's own library. The latter is left out where
our client asks: nothing limits how long it waits.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial

from loader.errors import FetchError, TransientError
from loader.http.body import HttpStream
from loader.http.client import HttpClient
from loader.http.objects import ObjectInfo
from loader.units import show_bytes

RANGE_BYTES = 4 << 20
LARGE_BYTES = 32 << 20
_AHEAD = 3  # ranges of one file that are asked for before their turn
_AT_ONCE = 16  # of all files
_HELD = re.compile(r"bytes (?P<start>\d{1,19})-(?P<last>\d{1,19})/\d{1,19}", re.IGNORECASE)
_by_user: list[bool] = []  # whether Xet was left out before it was by us


def leave_out_xet() -> None:
    """Let huggingface-hub bring files by HTTP, from the bridge that the Hub has before Xet."""
    from huggingface_hub import constants

    if not _by_user:
        _by_user.append(constants.HF_HUB_DISABLE_XET)
    constants.HF_HUB_DISABLE_XET = True


def choose_way(largest_bytes: int) -> None:
    """Take Xet after all where a file is larger than any that the Hub gives by HTTP.

    Raises:
        FetchError: the environment leaves it out.
    """
    from huggingface_hub import constants

    most_bytes = constants.MAX_HTTP_DOWNLOAD_SIZE
    fits = largest_bytes <= most_bytes
    if not fits and (_by_user[0] if _by_user else constants.HF_HUB_DISABLE_XET):
        raise FetchError(
            "a file larger than any that the Hub gives without Xet",
            expected=f"at most {show_bytes(most_bytes)}",
            got=show_bytes(largest_bytes),
            next_step="take HF_HUB_DISABLE_XET out of the environment",
        )
    if _by_user:
        constants.HF_HUB_DISABLE_XET = fits


class LargeBodies:
    """Which answers are read in ranges, and how. Safe to use from many threads."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._permits = threading.Semaphore(_AT_ONCE)
        self._whole: set[str] = set()  # hosts that do not honour ranges

    def span(self, url: str, status: int, fields: Mapping[str, str]) -> tuple[int, int] | None:
        """Return which bytes an answer has, None where it is to be read as it is."""
        tag, length = fields.get("etag", ""), fields.get("content-length", "")
        host = _host(url)
        is_plain = tag.startswith('"') and "content-encoding" not in fields
        if not is_plain or not length.isdecimal() or host in self._whole:
            return None
        if int(length) < LARGE_BYTES:
            return None
        if status == 200 and fields.get("accept-ranges", "").lower() == "bytes":
            return 0, int(length)
        held = _HELD.fullmatch(fields.get("content-range", ""))
        return (int(held["start"]), int(held["last"]) + 1) if status == 206 and held else None

    def read(
        self,
        url: str,
        headers: Mapping[str, str],
        fields: Mapping[str, str],
        span: tuple[int, int],
        first: HttpStream,
    ) -> Iterator[bytes]:
        """Yield the bytes of *span*, of which *first* brings those of the first range.

        Raises:
            LoaderError: they cannot be had, or are of another version.
        """
        total = fields.get("content-range", "").rpartition("/")[2] or fields["content-length"]
        version = ObjectInfo(int(total), fields["etag"])
        own = {name: value for name, value in headers.items() if name.lower() != "range"}
        start, end = span
        cuts = range(start, end, RANGE_BYTES)
        spans = deque((at, min(at + RANGE_BYTES, end)) for at in cuts)
        begun: deque[Future[bytes]] = deque()

        def look_ahead() -> None:
            while spans and len(begun) < _AHEAD and self._permits.acquire(blocking=False):
                read = partial(self._range, url, own, version, spans.popleft())
                begun.append(_begin(read, self._permits.release))

        size_bytes = spans[0][1] - start
        spans.popleft()
        look_ahead()
        with contextlib.closing(first):
            yield _exactly(first, size_bytes, url)
        while begun or spans:
            if begun:
                piece = begun.popleft()
                look_ahead()
                yield piece.result()
            else:
                now = spans.popleft()
                look_ahead()
                yield self._range(url, own, version, now)

    def _range(
        self, url: str, headers: Mapping[str, str], version: ObjectInfo, span: tuple[int, int]
    ) -> bytes:
        stream = self._client.get(url, span=span, version=version, headers=headers)
        with contextlib.closing(stream):
            if not stream.info.ranges:
                self._whole.add(_host(url))
                raise TransientError("the Hub does not honour ranges", where=url)
            return _exactly(stream, span[1] - span[0], url)


def _begin(read: Callable[[], bytes], done: Callable[[], None]) -> Future[bytes]:
    """Return what *read* returns, on a thread that nobody has to wait for."""
    future: Future[bytes] = Future()

    def run() -> None:
        try:
            future.set_result(read())
        except BaseException as error:
            future.set_exception(error)
        finally:
            done()

    threading.Thread(target=run, name="hub range", daemon=True).start()
    return future


def _exactly(stream: HttpStream, size_bytes: int, url: str) -> bytes:
    content = bytearray(size_bytes)
    view, done = memoryview(content), 0
    while done < size_bytes:
        count = stream.read_coded(view[done:])
        if not count:
            raise TransientError("the body ended before its length", where=url)
        done += count
    return bytes(content)


def _host(url: str) -> str:
    return url.partition("?")[0].split("/", 3)[2]
