"""Which tensors of a folder that fills up are here, told to the engine's workers.

A Unix socket of packets (SOCK_SEQPACKET) in a folder that nobody else may enter. Each packet is a
JSON object::

    feed -> follower
      {"kind": "file", "name": …, "size_bytes": n, "head": …}    for each file, numbered from 0 on;
                                               the head is its header's SHA-256
      {"kind": "files"}                        those were all
      {"kind": "open", "file": 0}              with a descriptor; before the file's first tensor
      {"kind": "here", "file": 0, "tensors": [3, 4, …]}    by their order in the file's header
      {"kind": "alive"}                        where nothing else was said for five seconds
      {"kind": "end"}                          all are here
      {"kind": "failed", "error": {…}}         the filling failed: a LoaderError
    follower -> feed
      {"kind": "taken", "bytes": n}            so many are in the engine
      {"kind": "done"}                         all that it wants
      {"kind": "failed", "what": …}            it cannot follow

A follower that cannot be heard any more leaves word in the file ``lost`` beside the socket.

Files that fill up are mapped, not copied: the kernel's page cache is the memory that all workers of
a node share, and it is there for as long as one of them uses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Self

from loader.arriving.filling import FillingFolder
from loader.arriving.packets import packet, receive_packet, socket_address
from loader.errors import EngineError, LoaderError, error_from_json
from loader.threads import Broadcast
from loader.types import Head
from loader.weights.header import parse_header

LOST = "lost"
HEARTBEAT_S = 5.0
SILENCE_S = 24 * HEARTBEAT_S  # that ends a follower's patience; the machine may be very busy
_NUMBERS = 2000  # of tensors in a packet
_MOST_PROBLEMS = 20
_BACKLOG = 128
_log = logging.getLogger("podloader")

Taken = Callable[[int, int], None]


class Feed:
    """Tells followers of *filling*, at the socket *path*, from its making until ``close``.

    *taken* is told, from many threads, how many bytes every follower has put into its engine, and
    how many they are in all; first when one comes.
    """

    def __init__(
        self, filling: FillingFolder, path: Path, taken: Taken = lambda done, total: None
    ) -> None:
        self._filling = filling
        self._lost = path.with_name(LOST)
        self._taken = taken
        self._files = [FedFile(name, *_describe(head)) for name, head in filling.heads.items()]
        self._places: dict[str, tuple[int, int]] = {}
        self.total_bytes = 0
        for number, file in enumerate(self._files):
            header = parse_header(filling.heads[file.name].content, file.size_bytes, file.name)
            for place, info in enumerate(header.tensors.values()):
                self._places[info.name] = number, place
                self.total_bytes += info.size_bytes
        self._here: Broadcast[tuple[int, int]] = Broadcast()
        self._lock = threading.Condition()
        self._followers: list[_Followed] = []
        self.error: BaseException | None = None
        """What ended the filling, if something did."""
        self.broken = ""
        """Why a follower could not follow, though the filling went on; empty where all could."""
        self._closed = False
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with socket_address(path) as address:
            self._listening.bind(address)
        path.chmod(0o600)
        self._listening.listen(_BACKLOG)
        for work in (self._gather, self._accept):
            threading.Thread(target=work, name="feed", daemon=True).start()

    @property
    def is_followed(self) -> bool:
        """Whether somebody has come."""
        with self._lock:
            return bool(self._followers)

    @property
    def is_taken(self) -> bool:
        """Whether somebody followed, and everybody who did has all."""
        with self._lock:
            return bool(self._followers) and all(one.is_done for one in self._followers)

    def wait_taken(self, timeout_s: float = 1.0) -> bool:
        """Return ``is_taken``; what an engine's worker said last may still be on its way."""
        with self._lock:
            return self._lock.wait_for(lambda: self.is_taken, timeout_s)

    def wait_broken(self, timeout_s: float = 1.0) -> str:
        """Return ``broken``, when all is heard of workers that have ended a moment ago."""
        with self._lock:
            self._lock.wait_for(lambda: all(one.is_over for one in self._followers), timeout_s)
        with contextlib.suppress(OSError):
            self.broken = self.broken or self._lost.read_text("utf-8")
        return self.broken

    def end(self, error: BaseException) -> None:
        """Let followers fail with *error*, if not all is here already."""
        self.error = self.error or error
        self._here.end(error)

    def close(self) -> None:
        """Hear and tell no more."""
        self._closed = True
        if not self.is_taken:
            self.broken = self.broken or "the feed was closed"
        self._here.end(EngineError("the feed of weights is closed"))
        with self._lock:
            ends = [one.end for one in self._followers]
        for end in (self._listening, *ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _gather(self) -> None:
        told: set[str] = set()
        try:
            for names in self._filling.follow():
                fresh = [name for name in dict.fromkeys(names) if name not in told]
                told.update(fresh)
                self._here.put(self._places[name] for name in fresh)
        except BaseException as error:
            self.end(error)
        else:
            self._here.end()

    def _accept(self) -> None:
        while not self._closed:
            try:
                end, _ = self._listening.accept()
            except OSError:
                if not self._closed:
                    self._break("the feed's socket failed")
                return
            one = _Followed(end)
            with self._lock:
                self._followers.append(one)
            self._tell_taken()
            for work in (self._hear, self._tell):
                threading.Thread(target=work, args=(one,), name="feed", daemon=True).start()

    def _tell(self, one: _Followed) -> None:
        try:
            for file in self._files:
                one.send("file", name=file.name, size_bytes=file.size_bytes, head=file.digest)
            one.send("files")
            opened: set[int] = set()
            for places in self._here.follow(HEARTBEAT_S):
                for number, group in groupby(places, key=lambda place: place[0]):
                    if number not in opened:
                        opened.add(number)
                        one.send_file(number, self._filling.open(self._files[number].name))
                    one.send_numbers(number, [place for _, place in group])
                if not places:
                    one.send("alive")
            one.send("end")
        except BaseException as error:
            if isinstance(error, ConnectionError) or one.end.fileno() < 0:
                return  # who follows no more is known to ``_hear``
            if self.error is None and not self._closed:
                self._break(f"{type(error).__name__}: {error}")
            with contextlib.suppress(OSError):
                one.send("failed", error=_to_json(error))

    def _hear(self, one: _Followed) -> None:
        with contextlib.closing(one.end):
            while message := receive_packet(one.end):
                kind = message["kind"]
                if kind == "failed":
                    self._break(str(message["what"]))
                    continue
                done = kind == "done"
                one.is_done = done
                one.taken_bytes = self.total_bytes if done else int(message["bytes"])
                self._tell_taken()
        with self._lock:
            one.is_over = True
            self._lock.notify_all()

    def _tell_taken(self) -> None:
        with self._lock:
            taken = min(one.taken_bytes for one in self._followers)
            self._lock.notify_all()
        self._taken(taken, self.total_bytes)

    def _break(self, what: str) -> None:
        _log.warning("an engine's worker cannot follow the weights: %s", what)
        self.broken = self.broken or what


@dataclass(frozen=True, slots=True)
class FedFile:
    """A weight file that fills up; ``digest`` is its header's."""

    name: str
    size_bytes: int
    digest: str


class _Followed:
    """The feed's end of a connection."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.taken_bytes = 0
        self.is_done = self.is_over = False

    def send(self, kind: str, **content: object) -> None:
        self.end.sendall(packet(kind, **content))

    def send_file(self, number: int, descriptor: int) -> None:
        try:
            socket.send_fds(self.end, [packet("open", file=number)], [descriptor])
        finally:
            os.close(descriptor)

    def send_numbers(self, file: int, numbers: Sequence[int]) -> None:
        for start in range(0, len(numbers), _NUMBERS):
            self.send("here", file=file, tensors=numbers[start : start + _NUMBERS])


class Follower:
    """A worker's end of a feed. A context manager; for one thread.

    Raises:
        EngineError: the feed is gone.
    """

    def __init__(self, path: Path) -> None:
        self._lost = path.with_name(LOST)
        self._end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._end.settimeout(SILENCE_S)
        try:
            with socket_address(path) as address:
                self._end.connect(address)
        except OSError as error:
            self._end.close()
            raise self._lose(str(error)) from error
        self._files: list[FedFile] = []
        self._descriptors: dict[int, int] = {}
        self.is_over = False
        """Whether all tensors are here."""
        try:
            while (message := self._next())["kind"] != "files":
                size_bytes, digest = int(message["size_bytes"]), str(message["head"])
                self._files.append(FedFile(str(message["name"]), size_bytes, digest))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self.close()

    @property
    def files(self) -> Mapping[str, FedFile]:
        """The files that fill up, by name."""
        return {file.name: file for file in self._files}

    def receive(self, *, wait: bool) -> Iterator[tuple[str, Sequence[int]]]:
        """Yield what has come since the last call: a file's name, and places in its header.

        With *wait*, at least one is waited for, as long as the feed says that it lives.

        Raises:
            LoaderError: what ended the filling.
            EngineError: the feed is gone, or silent.
        """
        while not self.is_over and (wait or self._is_readable()):
            message = self._next()
            if message["kind"] == "here":
                wait = False
                yield self._files[int(message["file"])].name, message["tensors"]

    def descriptor(self, file_name: str) -> int:
        """Return the descriptor of a file of which a tensor is here; ``close`` closes it."""
        numbers = (number for number, file in enumerate(self._files) if file.name == file_name)
        return self._descriptors[next(numbers)]

    def take(self, done_bytes: int) -> None:
        """Say that so many bytes are in the engine."""
        self._send("taken", bytes=done_bytes)

    def done(self) -> None:
        """Say that all that is wanted is in the engine."""
        self._send("done")

    def fail(self, what: str) -> None:
        """Say that the feed cannot be followed."""
        self._send("failed", what=what[:1000])

    def close(self) -> None:
        """Hear no more."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        self._end.close()

    def _send(self, kind: str, **content: object) -> None:
        with contextlib.suppress(OSError):  # the next ``receive`` tells that it is gone
            self._end.sendall(packet(kind, **content))

    def _is_readable(self) -> bool:
        self._end.settimeout(0)
        try:
            return bool(self._end.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False
        except OSError:
            return True  # and so it is told
        finally:
            self._end.settimeout(SILENCE_S)

    def _next(self) -> Mapping[str, Any]:
        try:
            message = receive_packet(self._end, self._keep)
        except TimeoutError:
            raise self._lose(f"nothing was heard for {SILENCE_S:.0f} seconds") from None
        if message is None:
            raise self._lose("the connection ended")
        if message["kind"] == "failed":
            raise error_from_json(message["error"])
        self.is_over = message["kind"] == "end"
        return message

    def _lose(self, why: str) -> EngineError:
        with contextlib.suppress(OSError):
            self._lost.write_text(f"the feed is gone: {why}", "utf-8")
        return EngineError(
            "the feed of weights is gone",
            got=why,
            next_step="start again: what has been fetched is kept",
        )

    def _keep(self, message: Mapping[str, Any], descriptors: Iterable[int]) -> None:
        for descriptor in descriptors:
            self._descriptors[int(message["file"])] = descriptor


def _describe(head: Head) -> tuple[int, str]:
    return head.size_bytes, head_digest(head.content)


def head_digest(content: bytes) -> str:
    """Return what tells a file's header from another's."""
    return hashlib.sha256(content).hexdigest()


def _to_json(error: BaseException) -> Mapping[str, object]:
    if not isinstance(error, LoaderError):
        error = EngineError(f"{type(error).__name__}: {error}")
    told = error.to_json()
    short = {name: text[:2000] for name, text in told.items() if isinstance(text, str)}
    return {**short, "problems": [text[:200] for text in error.problems[:_MOST_PROBLEMS]]}
