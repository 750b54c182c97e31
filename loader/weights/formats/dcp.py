"""torch.distributed.checkpoint -> tensors as pieces.

::

    <rank 0's folder>/.metadata              a pickle: tensors, their chunks, and where each lies
    <rank r's folder>/__<r>_<n>.distcp       chunks, one ``torch.save`` archive after another;
                                             or, saved as SerializationFormat.SAFETENSORS, all of
                                             them in one safetensors file at the end of it

Source of the format: torch/distributed/checkpoint/metadata.py and filesystem.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from loader.errors import CheckpointError, FormatError, UnsupportedError
from loader.weights.byte_files import ByteFile
from loader.weights.formats.archive import Archive
from loader.weights.formats.hfstorage import read_range_header
from loader.weights.formats.pieces import Piece, SourceTensor, describe_box, find_holes
from loader.weights.formats.rank_files import Files, read_all
from loader.weights.formats.records import Record, TensorRef, dimensions, is_count
from loader.weights.formats.unpickling import unpickle
from loader.weights.header import DTYPE_BITS, Header, size_bytes

METADATA = ".metadata"
MAX_METADATA_BYTES = 1 << 30
_OPENED_AT_ONCE = 8  # chunks: a few small reads each, which may go to the origin


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and the bytes [start, start + length) of the file that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file_name: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class ChunkedTensor:
    """A tensor as ``.metadata`` describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class DcpSource:
    """A distributed checkpoint's tensors."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._tensors = read_metadata(files)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tensor.shape for name, tensor in self._tensors.items()
        }
        self.dtypes: Mapping[str, str] = {
            name: tensor.dtype for name, tensor in self._tensors.items()
        }

    def open(self, names: Sequence[str], dtype: str | None) -> tuple[SourceTensor, ...]:
        """Return the tensors of these names; they are stored in one dtype, whatever is asked.

        Raises:
            CheckpointError, FormatError: as ``read_chunks``.
        """
        return read_chunks({name: self._tensors[name] for name in names}, self._files)


def read_metadata(files: Files) -> Mapping[str, ChunkedTensor]:
    """Return every tensor that ``.metadata`` names; what is no tensor is left out.

    Raises:
        FormatError: there is none, or it is malformed; of wrong tensors all are listed.
        UnsupportedError: a name in it is not allowed, or the chunks are compressed.
    """
    if METADATA not in files.names:
        raise FormatError(
            "no rank has .metadata, which says where each tensor lies",
            expected=f"{METADATA} beside the .distcp files of one rank",
            got=", ".join(sorted(files.names)[:8]) or "nothing",
            next_step="fetch the folders of all ranks: rank-*/<checkpoint>/",
        )
    file = files.open(METADATA)
    root = unpickle(read_all(file, limit_bytes=MAX_METADATA_BYTES), file.where)
    entries = root.get("state_dict_metadata") if isinstance(root, Record) else None
    stored = root.get("storage_data") if isinstance(root, Record) else None
    if not isinstance(entries, dict) or not isinstance(stored, dict):
        raise _malformed(file.where, ["no state_dict_metadata and storage_data"])
    places: dict[tuple[object, object], Record] = {
        (key.get("fqn"), key.get("offset")): place
        for key, place in stored.items()
        if isinstance(key, Record) and isinstance(place, Record)
    }
    found: dict[str, ChunkedTensor] = {}
    problems = []
    for name, entry in entries.items():
        if isinstance(entry, Record) and entry.kind.endswith(".TensorStorageMetadata"):
            try:
                found[str(name)] = _read_tensor(str(name), entry, places)
            except (ValueError, TypeError) as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise _malformed(file.where, problems)
    return found


def read_chunks(tensors: Mapping[str, ChunkedTensor], files: Files) -> tuple[SourceTensor, ...]:
    """Return *tensors* with the place of every chunk's bytes, in the order given.

    Raises:
        CheckpointError: ranks' files that are missing or cut short; every hole is listed.
        FormatError: chunks that are not what ``.metadata`` says.
    """
    holes = [hole for tensor in tensors.values() for hole in _missing(tensor, files)]
    if holes:
        raise CheckpointError(
            "parts of tensors that no rank's folder holds",
            problems=holes,
            next_step="fetch the folders of all ranks, rank-*/<checkpoint>/; if they are there, "
            "the upload of one was cut short",
        )
    headers = {
        (chunk.file_name, chunk.start): read_range_header(files.open(chunk.file_name), chunk.start)
        for tensor in tensors.values()
        for chunk in tensor.chunks
        if _is_bare(tensor, chunk)
    }

    def open_chunk(tensor: ChunkedTensor, chunk: Chunk) -> Piece:
        if header := headers.get((chunk.file_name, chunk.start)):
            return _find_chunk(tensor, chunk, files.open(chunk.file_name), header)
        return _open_chunk(tensor, chunk, files)

    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        chunks = [(t, chunk) for t in tensors.values() for chunk in t.chunks]
        opened = pool.map(lambda pair: open_chunk(*pair), chunks)
        made = [
            SourceTensor(t.name, t.dtype, t.shape, t.shape, tuple(islice(opened, len(t.chunks))))
            for t in tensors.values()
        ]
    if problems := [hole for tensor in made for hole in find_holes(tensor)]:
        raise CheckpointError(
            "tensors whose parts do not make them up",
            problems=problems,
            next_step="save the checkpoint again; its .metadata contradicts itself",
        )
    return tuple(made)


def _read_tensor(
    name: str, entry: Record, places: Mapping[tuple[object, object], Record]
) -> ChunkedTensor:
    properties, chunks = entry.get("properties"), entry.get("chunks")
    state = properties.state if isinstance(properties, Record) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if dtype is None and isinstance(properties, Record):
        dtype = properties.get("dtype")
    if dtype not in DTYPE_BITS or not isinstance(chunks, list):
        raise ValueError("no dtype or no chunks")
    shape = dimensions(entry.get("size"))
    found = []
    for chunk in chunks:
        if not isinstance(chunk, Record):
            raise ValueError("a chunk that is none")
        offsets, sizes = dimensions(chunk.get("offsets")), dimensions(chunk.get("sizes"))
        place = places.get((name, offsets)) or (places.get((name, None)) if not shape else None)
        if place is None and 0 not in sizes:
            raise ValueError(f"no file is named for {describe_box(offsets, sizes)}")
        if place is not None and 0 not in sizes:
            found.append(_read_place(offsets, sizes, place))
    return ChunkedTensor(name, str(dtype), shape, tuple(found))


def _read_place(offsets: tuple[int, ...], sizes: tuple[int, ...], place: Record) -> Chunk:
    file_name = place.get("relative_path")
    start, length = place.get("offset"), place.get("length")
    if not isinstance(file_name, str) or not is_count(start) or not is_count(length):
        raise ValueError("a chunk without file, offset or length")
    if place.get("transform_descriptors"):
        raise UnsupportedError(
            "compressed or encrypted chunks of a distributed checkpoint",
            where=file_name,
            got=str(place.get("transform_descriptors"))[:200],
            next_step="save the checkpoint without storage extensions",
        )
    return Chunk(offsets, sizes, file_name, start, length)


def _missing(tensor: ChunkedTensor, files: Files) -> Iterator[str]:
    for chunk in tensor.chunks:
        box = f"{tensor.name} {describe_box(chunk.offsets, chunk.sizes)}"
        if chunk.file_name not in files.names:
            yield f"{box}: no rank has {chunk.file_name}"
        elif chunk.start + chunk.length > (size := files.open(chunk.file_name).size_bytes):
            end = chunk.start + chunk.length
            yield f"{box}: {chunk.file_name} has {size} bytes, {end} are needed"


def _is_bare(tensor: ChunkedTensor, chunk: Chunk) -> bool:
    """Return whether the bytes of a chunk are its elements' alone: no archive is around them."""
    return chunk.length == size_bytes(tensor.dtype, chunk.sizes)


def _find_chunk(tensor: ChunkedTensor, chunk: Chunk, file: ByteFile, header: Header) -> Piece:
    """Return a chunk as the safetensors file that begins at its start has it."""
    info = header.tensors.get(tensor.name)
    if info is None or (info.dtype, info.shape) != (tensor.dtype, chunk.sizes):
        got = f"{info.dtype} {info.shape}" if info else "no such tensor"
        raise _not_as_described(f"{file.where}: {tensor.name}", tensor, chunk, got)
    return Piece(file, chunk.start + info.start, info.dtype, chunk.offsets, chunk.sizes)


def _open_chunk(tensor: ChunkedTensor, chunk: Chunk, files: Files) -> Piece:
    archive = Archive(files.open(chunk.file_name), chunk.start, chunk.start + chunk.length)
    value = archive.value
    if (
        not isinstance(value, TensorRef)
        or value.dtype != tensor.dtype
        or value.shape != chunk.sizes
    ):
        got = f"{value.dtype} {value.shape}" if isinstance(value, TensorRef) else str(type(value))
        raise _not_as_described(f"{archive.where}: {tensor.name}", tensor, chunk, got)
    return archive.piece(value, chunk.offsets)


def _not_as_described(where: str, tensor: ChunkedTensor, chunk: Chunk, got: str) -> FormatError:
    return FormatError(
        "a chunk that is not what .metadata says",
        where=where,
        expected=f"{tensor.dtype} {chunk.sizes}",
        got=got,
        next_step="fetch the folders of all ranks again, of one and the same checkpoint",
    )


def _malformed(where: str, problems: list[str]) -> FormatError:
    return FormatError(
        "a distributed checkpoint's .metadata that cannot be used",
        where=where,
        problems=problems,
        next_step="fetch it again, or save the checkpoint again",
    )
