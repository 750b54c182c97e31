"""What is fuzzed: bytes that anybody may have written in, a value or an error of ours out.

Each target lets every other exception pass, which is a finding.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loader.adapters.config import parse_adapter_config
from loader.config.settings import Settings
from loader.errors import FormatError, LoaderError
from loader.http.addresses import is_link_local
from loader.http.expiry import expiry, refused
from loader.http.grammar import AnswerError
from loader.http.response import Answer, Inbox, UnansweredError
from loader.http.sockets import PlainSocket
from loader.prepare.named_base import named_base
from loader.resolve.manifest import check_count, check_names, resolve
from loader.stores.listing import parse_listings
from loader.weights.formats.archive import Archive
from loader.weights.formats.records import Record, TensorRef
from loader.weights.formats.unpickling import unpickle
from loader.weights.header import parse_header
from loader.weights.index import weight_map

WHERE = "somewhere"


class Wire(PlainSocket):
    """A connection on which *data* comes, a few bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self.deadline = 0.0
        self._data = data

    def begin_time(self, limit_s: float | None = None) -> None:
        """Nobody waits here."""

    def hold(self) -> None:
        """Nobody closes it."""

    def let_go(self) -> None:
        """Nobody does."""

    def recv_some(self, buffer: memoryview, /) -> int:
        """Give the next bytes, 0 at the end."""
        count = min(len(buffer), len(self._data), 1 + len(self._data) // 3)
        buffer[:count] = self._data[:count]
        self._data = self._data[count:]
        return count

    def recv_into(self, buffer: memoryview, /) -> int:
        """Give the next bytes, 0 at the end."""
        return self.recv_some(buffer)


class Held:
    """A ``ByteFile`` of *data*."""

    where, digest = WHERE, None

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size_bytes = len(data)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill *buffer* from *start* on."""
        piece = self._data[start : start + len(buffer)]
        if len(piece) < len(buffer):
            raise FormatError("the file ends before", where=WHERE)
        buffer[:] = piece

    def descriptor(self, start: int, end: int) -> None:
        """Return None: it is in no file."""

    def close(self) -> None:
        """Do nothing."""


def answers(data: bytes) -> None:
    """Read answers on one connection, as long as there are any."""
    method = "HEAD" if data[:1] == b"\0" else "GET"
    inbox = Inbox(Wire(data[1:]))
    with contextlib.suppress(AnswerError, UnansweredError):
        for _ in range(8):
            answer = Answer(inbox, method)
            body = answer.read(1 << 16)
            assert answer.length is None or len(body) <= answer.length
            refused(f"http://h/x?{len(body)}", answer.status, answer.reason, body)
            answer.close()
            if answer.will_close:
                break


def headers(data: bytes) -> None:
    """Read the header of a safetensors file, whose tensors take what is left of it."""
    header = parse_header(data, len(data), WHERE)
    assert sum(t.size_bytes for t in header.tensors.values()) == len(data) - header.data_start


def pickles(data: bytes) -> None:
    """Read a pickle, and what it holds; a Record's state is one more value."""
    _walk(unpickle(data, WHERE))


def archives(data: bytes) -> None:
    """Read what ``torch.save`` wrote, and where its tensors lie."""
    archive = Archive(Held(data))
    for tensor in _walk(archive.value):
        with contextlib.suppress(FormatError):
            piece = archive.piece(tensor)
            assert piece.start <= len(data)


def listings(data: bytes) -> None:
    """Read a listing, and choose from it."""
    found = parse_listings(data, WHERE)
    for listing in found:
        check_count(listing)
        check_names(listing.artifacts)
        for artifact in listing.artifacts:
            expiry(artifact.url)
            assert ".." not in artifact.path.split("/")
            assert "?" not in artifact.source.removesuffix("?…")
    text = json.dumps([{"training_job_id": one.job, "paths": ["rank-*"]} for one in found])
    training = Settings.load(_truss({}, references=json.loads(text))).training
    resolve(training, found)


def configs(data: bytes) -> None:
    """Read JSON as each of the documents that a checkpoint brings, and as settings."""
    value = json.loads(data)
    with contextlib.suppress(LoaderError):
        weight_map(data, WHERE)
    if not isinstance(value, dict):
        return
    with contextlib.suppress(LoaderError):
        config = parse_adapter_config(value, Path("x"))
        config.attach_obstacles()
        config.merge_obstacles()
        assert 0 < config.max_rank <= 1 << 20
    with contextlib.suppress(LoaderError):
        base = named_base({"a": value.get("base_model_name_or_path")})
        assert "://" not in base.name
        assert not base.name.startswith(("/", ".", "~"))
    with contextlib.suppress(LoaderError):
        repr(Settings.load(_truss(value)))
    with contextlib.suppress(LoaderError):
        Settings.load(value)


def hosts(data: bytes) -> None:
    """Ask of any host whether it is of the machine's own link."""
    is_link_local(data.decode("utf-8", "surrogateescape"))


TARGETS: Mapping[str, Callable[[bytes], None]] = MappingProxyType(
    {f.__name__: f for f in (answers, headers, pickles, archives, listings, configs, hosts)}
)


def run(name: str, data: bytes) -> None:
    """Do what *name* does with *data*; an error of ours has to be one that can be printed."""
    try:
        TARGETS[name](data)
    except LoaderError as error:
        text = str(error)
        text.encode()
        assert len(text) < 1 << 20
        assert all(letter.isprintable() or letter == "\t" for letter in text.replace("\n", ""))
    except (ValueError, RecursionError):
        if name != "configs":  # the text was no JSON
            raise


def _truss(section: dict[str, Any], references: object = ()) -> dict[str, Any]:
    checkpoints = {
        "artifact_references": references or [{"training_job_id": "j", "paths": ["*"]}],
    }
    return {"training_checkpoints": checkpoints, "model_metadata": {"podloader": section}}


def _walk(value: object) -> list[TensorRef]:
    """Return the tensors in *value*, found as a reader of checkpoints does: by recursion."""
    if isinstance(value, TensorRef):
        return [value]
    if isinstance(value, Record):
        return _walk(value.args) + _walk(value.state)
    inner = value.values() if isinstance(value, dict) else value
    if isinstance(inner, str | bytes) or not hasattr(inner, "__iter__"):
        return []
    return [tensor for one in inner for tensor in _walk(one)]
