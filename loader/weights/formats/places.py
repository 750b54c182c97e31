"""Where a sharded checkpoint lies: a folder for each rank; torch stays out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from loader.errors import CheckpointError
from loader.types import Checkpoint, Kind
from loader.weights.frameworks import BESIDE
from loader.weights.inspect import ADAPTER_CONFIG, find_checkpoints
from loader.weights.layout import walk_names

CONFIG = "config.json"


def weight_folders(checkpoint: Checkpoint) -> list[Path]:
    """Return the folders that hold the weights, one per rank."""
    folders = checkpoint.detail.get("folders")
    found = [Path(str(f)) for f in folders] if isinstance(folders, list | tuple) else []
    return found or [checkpoint.path]


def home_folders(checkpoint: Checkpoint) -> list[Path]:
    """Return the folders where configs and tokenizers lie: of each rank, the checkpoint's own."""
    name = checkpoint.path.name
    folders = [f if f.name == name else f.parent for f in weight_folders(checkpoint)]
    found = list(dict.fromkeys([checkpoint.path, *folders]))
    beside = (
        [folder / name for folder in found for name in BESIDE]
        if checkpoint.kind is Kind.DTENSOR
        else []
    )
    return [*beside, *found]


def has_config(checkpoint: Checkpoint) -> bool:
    """Return whether a rank's folder says which model or adapter the tensors are of."""
    names = (CONFIG, ADAPTER_CONFIG)
    return any((f / name).is_file() for f in home_folders(checkpoint) for name in names)


def find_sharded(folders: Sequence[Path]) -> Checkpoint:
    """Return the one checkpoint in *folders*: one with ``rank-*/`` in it, or each rank's own.

    Raises:
        CheckpointError: there is none, there are several, or there is no such folder.
        FormatError: a config or an index is malformed.
    """
    if absent := [str(folder) for folder in folders if not folder.is_dir()]:
        raise CheckpointError(
            "no such checkpoint folder", problems=absent, next_step="correct the path"
        )
    if len(folders) == 1:
        found = find_checkpoints(folders[0])
    else:
        root = Path(os.path.commonpath([folder.absolute() for folder in folders]))
        found = find_checkpoints(
            root,
            [
                (folder.absolute().relative_to(root) / name).as_posix()
                for folder in folders
                for name in walk_names(folder)
            ],
        )
    if len(found) == 1:
        return found[0]
    raise CheckpointError(
        "one checkpoint is consolidated at a time",
        where=", ".join(map(str, folders)),
        expected="the folder of one checkpoint, or of each rank: job/rank-*/checkpoint-10",
        got=f"{len(found)} checkpoints",
        problems=[f"{c.kind}: {c.path}" for c in found],
    )
