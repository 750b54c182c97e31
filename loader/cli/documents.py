"""The JSON documents, one function each. ``version`` is added where they are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loader.types import Checkpoint, Manifest, ReadyModel, Snapshot


def plan_document(manifest: Manifest, folder: Path, free_bytes: int) -> dict[str, object]:
    """Return ``files`` (path, job, rank, size_bytes or null), ``total_bytes`` (null: not known)."""
    sizes = [artifact.size_bytes for artifact in manifest.files]
    return {
        "download_folder": str(folder),
        "files": [
            {"path": a.path, "job": a.job, "rank": a.node_rank, "size_bytes": a.size_bytes}
            for a in manifest.files
        ],
        "total_bytes": None if None in sizes else sum(size for size in sizes if size),
        "free_bytes": free_bytes,
        "warnings": list(manifest.warnings),
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


def checkpoints_document(checkpoints: Sequence[Checkpoint]) -> dict[str, object]:
    """Return ``checkpoints``: kind, path, detail."""
    return {
        "checkpoints": [
            {"kind": c.kind.value, "path": str(c.path), "detail": c.detail} for c in checkpoints
        ]
    }


def consolidated_document(sharded: Checkpoint, made: Checkpoint) -> dict[str, object]:
    """Return ``path`` and ``kind`` ("full" or "adapter") of what was made, and ``source``."""
    return {
        "path": str(made.path),
        "kind": made.kind.value,
        "detail": made.detail,
        "source": {"kind": sharded.kind.value, "path": str(sharded.path), "detail": sharded.detail},
    }
