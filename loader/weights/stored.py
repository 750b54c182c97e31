"""Where each tensor of a local folder is stored, from indexes and headers alone; without torch.

::

    <folder>/<stem>.safetensors
    <folder>/<stem>.safetensors.index.json + the files it names
    <folder>/<pickle stem>.bin, or its index + files      pickles: found, never opened here
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from loader.errors import FormatError
from loader.weights.header import Header, TensorInfo, read_header
from loader.weights.index import read_weight_map

PICKLE_STEMS: Mapping[str, str] = MappingProxyType(
    {"model": "pytorch_model", "adapter_model": "adapter_model"}
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and the safetensors file it lies in."""

    path: Path
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weight files of a folder in order; all safetensors, or all pickles."""

    paths: tuple[Path, ...]
    pickled: bool


def find_weight_files(folder: Path, stem: str = "model") -> WeightFiles:
    """Return the weight files of *folder*; safetensors win over pickles.

    Raises:
        FormatError: there are none, or an index names files that are not there (all are listed).
    """
    for name, pickled in (
        (f"{stem}.safetensors", False),
        (f"{PICKLE_STEMS.get(stem, stem)}.bin", True),
    ):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return WeightFiles((folder / name,), pickled)
        if index.is_file():
            paths = tuple(folder / shard for shard in sorted(set(read_weight_map(index).values())))
            _check_there(index, paths)
            return WeightFiles(paths, pickled)
    raise FormatError(
        "no weights in this folder",
        where=str(folder),
        expected=f"{stem}.safetensors, or shards with {stem}.safetensors.index.json",
        got=", ".join(sorted(p.name for p in folder.glob("*"))[:10]) or "nothing",
        next_step="give the folder that save_pretrained wrote",
    )


def list_tensors(files: WeightFiles) -> Mapping[str, StoredTensor]:
    """Return all tensors of safetensors *files* by name, file by file in the order of bytes.

    Raises:
        FormatError: a header is broken, a name is in two files, or the files are pickles.
    """
    if files.pickled:
        raise refuse_pickle(files.paths[0])
    return join_headers({path: read_header(path) for path in files.paths})


def join_headers(headers: Mapping[Path, Header]) -> Mapping[str, StoredTensor]:
    """Return all tensors of the files of one checkpoint by name, file by file.

    Raises:
        FormatError: a name is in two files.
    """
    found: dict[str, StoredTensor] = {}
    twice = []
    for path, header in headers.items():
        for name, info in header.tensors.items():
            if name in found:
                twice.append(f"{name}: in {found[name].path.name} and in {path.name}")
            found[name] = StoredTensor(path, info)
    if twice:
        raise FormatError(
            "tensors stored twice",
            where=str(next(iter(headers)).parent),
            problems=twice,
            next_step="remove the files that belong to another checkpoint",
        )
    return MappingProxyType(found)


def read_bytes(stored: StoredTensor) -> bytes:
    """Return the bytes of one tensor.

    Raises:
        FormatError: the file cannot be read, or became shorter.
    """
    try:
        with stored.path.open("rb") as file:
            file.seek(stored.info.start)
            data = file.read(stored.info.size_bytes)
    except OSError as error:
        raise FormatError("weights that cannot be read", where=str(stored.path)) from error
    if len(data) != stored.info.size_bytes:
        raise FormatError("a weight file became shorter", where=str(stored.path))
    return data


def refuse_pickle(path: Path) -> FormatError:
    """Return the error for a pickle where safetensors is expected."""
    return FormatError(
        "a pickle where safetensors is expected",
        where=str(path),
        expected="a .safetensors file",
        got="a file that could run code when it is opened",
        next_step="save with safe_serialization=True, or set allow_pickle: true (weights only)",
    )


def _check_there(index: Path, paths: tuple[Path, ...]) -> None:
    if absent := [path.name for path in paths if not path.is_file()]:
        raise FormatError(
            "shards that an index names are not there",
            where=str(index),
            problems=absent,
            next_step="fetch the whole checkpoint",
        )
