"""What a folder of files is: decided from names, small JSON files and headers; torch stays out.

A checkpoint of several nodes is one checkpoint. ``Checkpoint.path`` is the folder to open; where
the files are spread, ``detail["folders"]`` are all folders that hold some of them.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path

from loader.config.paths import suggest_path
from loader.errors import CheckpointError, FormatError, LoaderError
from loader.json_text import parse_json
from loader.types import Checkpoint, Kind
from loader.units import show_bytes
from loader.weights.byte_files import LocalFile
from loader.weights.formats.archive import Archive
from loader.weights.frameworks import BESIDE, find_cut, find_optimizers, find_zero
from loader.weights.header import Header, read_header
from loader.weights.index import MOST_SHARDS, read_weight_map
from loader.weights.layout import Place, group_places, walk_names

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
SINGLE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MODULES = "modules.json"
SHARE = "podloader_share.json"
"""Beside a part of a model's tensors, which one node's engine takes: nobody else's model."""
_PEFT_NAME = re.compile(r"^base_model\.model\.|\.base_layer\.(weight|bias)$|\.lora_[AB]\.")
_WRAPPED = {
    "lacks": "a model's own tensors: these are the state dict of a PeftModel, not merged",
    "next_step": "save the adapter with the PeftModel's save_pretrained, or merge_and_unload first",
}
_Read = Callable[[Path], Header | None]
_MOST_JSON_BYTES = 256 << 20
_ANOTHER_MODEL = re.compile(r"^(model_\d+\.safetensors|pytorch_model_\d+\.bin)$")  # accelerate's
_SHARD = re.compile(r"^(model|pytorch_model)-(\d{5,9})-of-(\d{5,9})\.(safetensors|bin)$")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return what *folder* is; UNKNOWN, with the list, when it holds several checkpoints.

    Raises:
        CheckpointError: there is no such folder.
        FormatError: a config or an index in it is malformed.
    """
    if not folder.is_dir():
        raise CheckpointError(
            "no such checkpoint folder",
            where=str(folder.absolute()),
            expected="a folder with a model or an adapter",
            got="a file" if folder.exists() else "nothing",
            next_step="give the folder that it lies in"
            if folder.exists()
            else suggest_path(folder, "give the path of a folder, or of a listing"),
        )
    found = find_checkpoints(folder)
    if len(found) == 1:
        return found[0]
    if here := [c for c in found if c.path == folder]:
        return here[0]
    names = [f"{c.path.relative_to(folder)} ({c.kind})" for c in found]
    return Checkpoint(Kind.UNKNOWN, folder, {"found": names, "lacks": "one checkpoint of its own"})


def read_if_here(path: Path) -> Header | None:
    """Return the header of a safetensors file, None where it is not on this disk.

    Raises:
        FormatError: it is malformed.
    """
    return read_header(path) if path.is_file() else None


def find_checkpoints(
    root: Path,
    names: Iterable[str] | None = None,
    read: _Read = read_if_here,
) -> tuple[Checkpoint, ...]:
    """Return the checkpoints below *root*, sorted by job and folder.

    ``names`` are paths relative to *root*; when given, only these files count. ``read`` gives the
    header of a weight file, wherever it is. A job in which nothing is known gives one UNKNOWN.

    Raises:
        FormatError: a config or an index is malformed.
    """
    places = group_places(root, walk_names(root) if names is None else names)
    found: list[Checkpoint] = []
    for _, group in groupby(places, key=lambda place: place.job):
        of_job = tuple(group)
        known = _find_in_job(of_job, read)
        found += known or _describe_unknown(of_job)
    return tuple(found)


def _find_in_job(places: tuple[Place, ...], read: _Read) -> list[Checkpoint]:
    by_folder = {place.relative: place for place in places}
    places = tuple(p for p in places if not _is_part(p, by_folder))
    whole = {p.relative: c for p in places if (c := _find_adapters(p) or _find_models(p, read))}
    zero = find_zero(places, by_folder)
    for relative in set(zero) & set(whole):
        # ZeRO-3 without gathering leaves a model file of empty tensors beside the true weights.
        if not any(_is_hollow(c, read) for c in whole[relative]):
            del zero[relative]
    cut = find_cut(places, by_folder).items()
    others = {
        r: c for r, c in cut if not {r, *(f"{r}/{n}".lstrip("/") for n in BESIDE)} & whole.keys()
    }
    sharded = {r: [c] for r, c in {**others, **zero}.items()}
    merged = {**whole, **sharded}
    return [c for relative in sorted(merged) for c in merged[relative]]


def _is_part(place: Place, by_folder: Mapping[str, Place]) -> bool:
    """Return whether the folder is a part of the model above it, as sentence-transformers saves."""
    owner = by_folder.get(place.parent) if place.relative else None
    return owner is not None and MODULES in owner.names


def _find_adapters(place: Place) -> list[Checkpoint]:
    ranks = [
        rank
        for rank in place.holders(ADAPTER_CONFIG)
        if any(name in place.files[rank] for name in ADAPTER_WEIGHTS)
    ]
    found: dict[tuple[object, ...], Checkpoint] = {}
    for rank in ranks:
        folder = place.folder(rank)
        config = read_json(folder / ADAPTER_CONFIG)
        detail = describe_adapter(config)
        weights = next(name for name in ADAPTER_WEIGHTS if name in place.files[rank])
        # Every node may have written the same adapter: the lowest rank's is taken for all.
        alike = (json.dumps(config, sort_keys=True), weights, _file_bytes(folder / weights))
        found.setdefault(alike, Checkpoint(Kind.ADAPTER, folder, detail))
    return list(found.values())


def describe_adapter(config: Mapping[str, object]) -> dict[str, object]:
    """Return the detail of an adapter's ``Checkpoint``."""
    return {
        "base_model": config.get("base_model_name_or_path"),
        "revision": config.get("revision"),
        "rank": config.get("r"),
        "targets": config.get("target_modules"),
        "peft_type": config.get("peft_type"),
    }


def _find_models(place: Place, read: _Read) -> list[Checkpoint]:
    configs = place.holders("config.json")
    names = place.names
    if not configs or not any(_is_weights(name) for name in names):
        return []
    if shares := place.holders(SHARE):
        share = read_json(place.folder(shares[0]) / SHARE).get("share")
        lacks = f"the other tensors of the model: this is {share}"
        return [
            Checkpoint(Kind.UNKNOWN, place.folder(shares[0]), {"found": [SHARE], "lacks": lacks})
        ]
    config = read_json(place.folder(configs[0]) / "config.json")
    holders = [rank for rank in place.ranks if any(_is_weights(n) for n in place.files[rank])]
    whole = [r for r in holders if not _missing_shards(place, place.files[r], r)]
    spread = len(holders) > 1 and not whole
    missing = _missing_shards(place, names, None) if not whole else []
    detail = _describe_model(config, names)
    if missing:
        detail["missing"] = missing
    if spread:
        detail["folders"] = [str(place.folder(rank)) for rank in place.ranks]
        return [Checkpoint(Kind.RANK_SHARDS, place.folder(configs[0]), detail)]
    # A rank with both config and weights first; copies on other ranks are the same model.
    at = next((r for r in whole or holders if r in configs), None)
    if at is None and len(place.ranks) > 1:
        detail["folders"] = [str(place.folder(rank)) for rank in place.ranks]
        return [Checkpoint(Kind.RANK_SHARDS, place.folder(configs[0]), detail)]
    if wrapped := _wrapped_names(place.folder(at), detail, read):
        return [Checkpoint(Kind.UNKNOWN, place.folder(at), {"found": wrapped, **_WRAPPED})]
    kind = Kind.WHISPER if config.get("model_type") == "whisper" else Kind.FULL
    return [Checkpoint(kind, place.folder(at), detail)]


def _wrapped_names(folder: Path, detail: Mapping[str, object], read: _Read) -> list[str]:
    """Return names of tensors that are a PeftModel's: its base and adapter in one state dict."""
    files = detail["files"]
    names: Iterable[str] = ()
    with contextlib.suppress(LoaderError):  # whoever opens it tells more
        index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
        if index is not None:
            names = read_weight_map(index)
        elif isinstance(files, list) and files:
            names = _tensor_names(folder / str(files[0]), read)
    return [name for name in names if _PEFT_NAME.search(name)][:3]


def _tensor_names(path: Path, read: _Read) -> Iterable[str]:
    if path.suffix == ".safetensors":
        header = read(path)
        return header.tensors if header else ()
    if not path.is_file():
        return ()
    with contextlib.closing(LocalFile(path)) as file:
        value = Archive(file).value
    return [name for name in value if isinstance(name, str)] if isinstance(value, Mapping) else ()


def is_safetensors(name: str) -> bool:
    """Return whether *name* is that of a model's weight file in safetensors, whole or a shard."""
    return name.endswith(".safetensors") and _is_weights(name)


def _is_weights(name: str) -> bool:
    return name in SINGLE_WEIGHTS or bool(_SHARD.match(name))


def _missing_shards(place: Place, names: frozenset[str], rank: int | None) -> list[str]:
    """Return the shards that *names* lack; the index of *rank*, else of any rank, says which."""
    if any(name in names for name in SINGLE_WEIGHTS):
        return []
    wanted: set[str] = set()
    for index in INDEXES:
        for holder in place.holders(index):
            if rank is None or holder == rank:
                wanted |= set(read_weight_map(place.folder(holder) / index).values())
    for match in filter(None, map(_SHARD.match, names)):
        stem, n, kind = match[1], int(match[3]), match[4]
        first = 0 if f"{stem}-{0:05d}-of-{n:05d}.{kind}" in names else 1
        if not wanted:
            wanted = {
                f"{stem}-{i:05d}-of-{n:05d}.{kind}"
                for i in range(first, first + min(n, MOST_SHARDS))
            }
    return sorted(wanted - names)


def _describe_model(config: Mapping[str, object], names: frozenset[str]) -> dict[str, object]:
    weights = sorted(name for name in names if _is_weights(name))
    safe = [name for name in weights if name.endswith(".safetensors")]
    detail: dict[str, object] = {
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
        "dtype": config.get("dtype", config.get("torch_dtype")),
        "format": "safetensors" if safe else "bin",
        "files": safe or weights,
    }
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        detail["quantization"] = quantization.get("quant_method", "unnamed")
    if others := sorted(filter(_ANOTHER_MODEL.match, names)):
        detail["models"] = [weights[0], *others]
    return detail


def _is_hollow(checkpoint: Checkpoint, read: _Read) -> bool:
    path = checkpoint.path / SINGLE_WEIGHTS[0]
    header = read(path) if checkpoint.kind is Kind.FULL else None
    return header is not None and any(0 in tensor.shape for tensor in header.tensors.values())


def _describe_unknown(places: tuple[Place, ...]) -> list[Checkpoint]:
    names = sorted({f"{p.relative}/{n}".lstrip("/") for p in places for n in p.names})
    kinds = {name.rpartition("/")[2] for name in names}
    if ADAPTER_CONFIG in kinds:
        lacks = " or ".join(ADAPTER_WEIGHTS)
    elif any(name in kinds for name in ADAPTER_WEIGHTS):
        lacks = ADAPTER_CONFIG
    elif any(_is_weights(name) for name in kinds):
        lacks = "config.json"
    elif optimizers := find_optimizers(places):
        return optimizers
    elif "config.json" in kinds:
        lacks = " or ".join(SINGLE_WEIGHTS)
    else:
        lacks = "anything that podloader knows"
    detail: dict[str, object] = {"found": names[:20], "files": len(names), "lacks": lacks}
    job = places[0].job
    root = places[0].root
    return [Checkpoint(Kind.UNKNOWN, root / job if job else root, detail)]


def read_json(path: Path) -> dict[str, object]:
    """Return the JSON object of a small file.

    Raises:
        FormatError: it cannot be read or is no JSON object.
    """
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise ValueError(f"more than {show_bytes(_MOST_JSON_BYTES)}")
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        value = str(error)
    if not isinstance(value, dict):
        raise FormatError(
            "malformed JSON file in a checkpoint",
            where=str(path),
            expected="a JSON object",
            got=str(value)[:200],
            next_step="fetch the file again, or save the checkpoint again",
        )
    return value


def write_share(folder: Path, text: str) -> None:
    """Say in *folder* that *text*, such as a pipeline stage, is all that it holds of its model."""
    (folder / SHARE).write_text(json.dumps({"share": text}) + "\n", encoding="utf-8")


def _file_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
