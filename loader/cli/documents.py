"""The JSON documents, one function each. ``version`` is added where they are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loader.errors import redact_url
from loader.prepare.cleaning import Cleaned
from loader.resolve.sum_files import Sums
from loader.types import (
    Artifact,
    Checkpoint,
    ReadyModel,
    Snapshot,
    sum_or_unknown,
    total_bytes,
)
from loader.weights.formats.serving import serving_files
from loader.weights.header import Header

if TYPE_CHECKING:
    from loader.prepare.forecast import Forecast


def plan_document(found: Forecast, folder: Path, free_bytes: int) -> dict[str, object]:
    """Return ``files`` (path, job, rank, size_bytes or null), ``total_bytes`` (null: not known).

    ``presence`` of a file: ``proved``, ``unproved`` (here, to be proved), ``missing``. Files of a
    base from the Hub or a URL have neither job nor rank. ``left_out`` are files as well, asked for
    and not fetched; ``all_bytes`` is the sum with them, ``serving_bytes`` the sum of what serving
    uses. ``room``: what is needed of disks, memory, GPUs and ``/dev/shm``, and what is there.
    """
    manifest, base = found.manifest, found.base
    asked = (*manifest.files, *manifest.left_out)
    needed = serving_files(artifact.path for artifact in asked)
    of_base = sum_or_unknown([file.size_bytes for file in found.base_files])

    def with_base(size: int | None) -> int | None:
        return None if size is None or of_base is None else size + of_base

    return {
        "download_folder": str(folder),
        "files": [
            _file(artifact) | {"presence": manifest.presence.get(artifact.path)}
            for artifact in manifest.files
        ]
        + [
            {
                "path": file.path,
                "job": None,
                "rank": None,
                "size_bytes": file.size_bytes,
                "presence": file.presence,
            }
            for file in found.base_files
        ],
        "left_out": [_file(artifact) for artifact in manifest.left_out],
        "total_bytes": with_base(total_bytes(manifest.files)),
        "all_bytes": with_base(total_bytes(asked)),
        "serving_bytes": with_base(total_bytes([a for a in asked if a.path in needed])),
        "free_bytes": free_bytes,
        "base": base
        and {
            "name": redact_url(base.name),
            "origin": base.origin,
            "folder": str(base.folder) if base.folder else None,
            "weight_bytes": base.weight_bytes,
        },
        "start": {
            "engine": found.engine,
            "mode": found.mode or None,
            "consolidates": found.consolidates,
            "why": found.why,
            "weights": found.weights_from,
            "share": {"what": found.share, "bytes": found.share_bytes} if found.share else None,
        },
        "room": [
            {
                "what": room.what,
                "folder": str(room.folder) if room.folder else None,
                "needed_bytes": room.needed_bytes,
                "have_bytes": room.have_bytes,
                "why": room.why,
                "enough": None if room.have_bytes is None else not room.is_short,
            }
            for room in found.room
        ],
        "urls_end": found.urls_end and found.urls_end.isoformat(timespec="seconds"),
        "warnings": [*manifest.warnings, *found.warnings],
    }


def _file(artifact: Artifact) -> dict[str, object]:
    return {
        "path": artifact.path,
        "job": artifact.job,
        "rank": artifact.node_rank,
        "size_bytes": artifact.size_bytes,
    }


def fetch_document(snapshot: Snapshot) -> dict[str, object]:
    """Return what ``plan_document`` does, with the digest of every file."""
    return {
        "download_folder": str(snapshot.root),
        "files": [
            {
                "path": file.path,
                "job": file.job,
                "rank": file.rank,
                "size_bytes": file.size_bytes,
                "digest": file.digest,
                "source": file.source,
                "reused": file.reused,
                "bytes_per_s": round(file.size_bytes / file.seconds) if file.seconds else None,
            }
            for file in snapshot.files
        ],
        "total_bytes": sum(file.size_bytes for file in snapshot.files),
        "fetched_bytes": snapshot.fetched_bytes,
        "seconds": round(snapshot.seconds, 3),
    }


def ready_document(ready: ReadyModel) -> dict[str, object]:
    """Return the ReadyModel."""
    return {
        "path": str(ready.path),
        "tokenizer": str(ready.tokenizer),
        "adapters": [{"name": a.name, "path": str(a.path), "rank": a.rank} for a in ready.adapters],
        "max_lora_rank": ready.max_lora_rank,
        "provenance": ready.provenance,
    }


def sums_document(path: Path, sums: Sums) -> dict[str, object]:
    """Return ``path`` of the manifest, and ``files``: each with the hexadecimal digests it has."""
    return {
        "path": str(path),
        "files": [
            {"path": name, **{checksum.algorithm: checksum.digest.hex() for checksum in found}}
            for name, found in sorted(sums.items())
        ],
    }


def cleaned_document(cleaned: Cleaned) -> dict[str, object]:
    """Return ``removed`` (path, bytes on the disk), ``freed_bytes``, and the models' kept_bytes."""
    return {
        "removed": [{"path": str(path), "bytes": size} for path, size in cleaned.removed],
        "freed_bytes": cleaned.freed_bytes,
        "kept_bytes": cleaned.kept_bytes,
    }


def checkpoints_document(checkpoints: Sequence[Checkpoint]) -> dict[str, object]:
    """Return ``checkpoints``: kind, path, detail."""
    return {
        "checkpoints": [
            {"kind": c.kind.value, "path": str(c.path), "detail": c.detail} for c in checkpoints
        ]
    }


def file_document(path: Path, header: Header) -> dict[str, object]:
    """Return ``file``: path, size_bytes, the parameters, metadata and every tensor."""
    tensors = header.tensors.values()
    return {
        "file": {
            "path": str(path),
            "size_bytes": path.stat().st_size,
            "parameters": sum(math.prod(t.shape) for t in tensors),
            "metadata": dict(header.metadata),
            "tensors": [
                {"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in tensors
            ],
        }
    }


def consolidated_document(sharded: Checkpoint, made: Checkpoint) -> dict[str, object]:
    """Return ``path`` and ``kind`` ("full" or "adapter") of what was made, and ``source``."""
    return {
        "path": str(made.path),
        "kind": made.kind.value,
        "detail": made.detail,
        "source": {"kind": sharded.kind.value, "path": str(sharded.path), "detail": sharded.detail},
    }
