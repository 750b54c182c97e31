"""The JSON documents, one function each. ``version`` is added where they are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loader.prepare.cleaning import Cleaned
from loader.resolve.sum_files import Sums
from loader.types import Artifact, Checkpoint, Manifest, ReadyModel, Snapshot
from loader.weights.formats.serving import serving_files


def plan_document(manifest: Manifest, folder: Path, free_bytes: int) -> dict[str, object]:
    """Return ``files`` (path, job, rank, size_bytes or null), ``total_bytes`` (null: not known).

    ``presence`` of a file: ``proved``, ``unproved`` (here, to be proved), ``missing``.
    ``left_out`` are files as well, asked for and not fetched; ``all_bytes`` is the sum with them,
    ``serving_bytes`` the sum of what serving uses.
    """
    asked = (*manifest.files, *manifest.left_out)
    needed = serving_files(artifact.path for artifact in asked)
    return {
        "download_folder": str(folder),
        "files": [
            _file(artifact) | {"presence": manifest.presence.get(artifact.path)}
            for artifact in manifest.files
        ],
        "left_out": [_file(artifact) for artifact in manifest.left_out],
        "total_bytes": total_bytes(manifest.files),
        "all_bytes": total_bytes(asked),
        "serving_bytes": total_bytes([a for a in asked if a.path in needed]),
        "free_bytes": free_bytes,
        "warnings": list(manifest.warnings),
    }


def total_bytes(artifacts: Sequence[Artifact]) -> int | None:
    """Return the sum of their sizes, None where one is not known."""
    sizes = [artifact.size_bytes for artifact in artifacts]
    return None if None in sizes else sum(size for size in sizes if size)


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


def consolidated_document(sharded: Checkpoint, made: Checkpoint) -> dict[str, object]:
    """Return ``path`` and ``kind`` ("full" or "adapter") of what was made, and ``source``."""
    return {
        "path": str(made.path),
        "kind": made.kind.value,
        "detail": made.detail,
        "source": {"kind": sharded.kind.value, "path": str(sharded.path), "detail": sharded.detail},
    }
