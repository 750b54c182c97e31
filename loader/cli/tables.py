"""What people read of a command's result; `documents` has the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loader.cli.documents import total_bytes
from loader.cli.report import say, show
from loader.prepare.cleaning import Cleaned
from loader.status.table import timeline_lines
from loader.timeline import Timeline
from loader.types import Checkpoint, Kind, Manifest, ReadyModel, Snapshot
from loader.units import show_bytes, show_rate, show_seconds
from loader.weights.formats.refused import find_refusal
from loader.weights.formats.serving import serving_files

_SHOWN = 50
_HERE = {
    "proved": "here, proved",
    "unproved": "here, to prove",
    "missing": "to be fetched",
    None: "",
}
_WOULD = {
    Kind.FULL: "would be served as it is",
    Kind.ADAPTER: "would be attached to its base, or merged into it",
    Kind.RANK_SHARDS: "would be consolidated into one model or adapter, then served",
    Kind.DCP: "would be consolidated into one model or adapter, then served",
    Kind.ZERO: "would be consolidated into one model or adapter, then served",
    Kind.DTENSOR: "would be consolidated into one model or adapter, then served",
    Kind.WHISPER: "would be served as it is, for transcriptions",
}


def show_plan(manifest: Manifest, folder: Path, free_bytes: int) -> None:
    """Show the files, the sum, the free disk and the warnings."""
    for artifact in manifest.files[:_SHOWN]:
        size = "?" if artifact.size_bytes is None else show_bytes(artifact.size_bytes)
        show(f"{size:>10}  {_HERE[manifest.presence.get(artifact.path)]:15}  {artifact.path}")
    if (more := len(manifest.files) - _SHOWN) > 0:
        show(f"{'':>10}  … and {more} more")
    known = [artifact.size_bytes for artifact in manifest.files if artifact.size_bytes is not None]
    unknown = len(manifest.files) - len(known)
    rest = f", {unknown} of them of unknown size" if unknown else ""
    total = show_bytes(sum(known)) if known or not unknown else "?"
    show(f"{total:>10}  {len(manifest.files)} files{rest} -> {folder}")
    _show_unused(manifest)
    show(f"{show_bytes(free_bytes):>10}  free")
    for warning in manifest.warnings:
        show(f"warning: {warning}")


def _show_unused(manifest: Manifest) -> None:
    """Show the other total: with what is left out, or without what serving will not use."""
    asked = (*manifest.files, *manifest.left_out)
    needed = serving_files(artifact.path for artifact in asked)
    used = [artifact for artifact in asked if artifact.path in needed]
    if manifest.left_out:
        total = total_bytes(asked)
        text = f"{len(asked)} files without weights_only_fetch"
    elif len(used) < len(asked):
        total = total_bytes(used)
        text = f"{len(used)} files with weights_only_fetch: true; serving uses no others"
    else:
        return
    show(f"{'?' if total is None else show_bytes(total):>10}  {text}")


def show_snapshot(snapshot: Snapshot, *, each: bool) -> None:
    """Show the sum; of *each* file, too, its size, rate, digest and source."""
    for file in snapshot.files if each else ():
        rate = show_rate(file.size_bytes / file.seconds) if file.seconds else "kept"
        show(f"{show_bytes(file.size_bytes):>10}  {rate:>12}  {file.digest}  {file.path}")
        show(f"{'':>24}  from {file.source}")
    kept = sum(1 for file in snapshot.files if file.reused)
    show(
        f"{len(snapshot.files)} files in {snapshot.root}: {show_bytes(snapshot.fetched_bytes)} "
        f"fetched, {kept} files kept, {show_seconds(snapshot.seconds)}"
    )


def show_ready(ready: ReadyModel) -> None:
    """Show what an engine would be given."""
    show(f"model      {ready.path}")
    show(f"tokenizer  {ready.tokenizer}")
    for adapter in ready.adapters:
        show(f"adapter    {adapter.name} (rank {adapter.rank})  {adapter.path}")
    if ready.max_lora_rank is not None:
        show(f"max rank   {ready.max_lora_rank}")


def show_timeline(timeline: Timeline) -> None:
    """Show when each stage began and how long it took, and the same as bars."""
    for line in timeline_lines(timeline):
        say(line)


def show_checkpoints(checkpoints: Sequence[Checkpoint]) -> None:
    """Show what each checkpoint is and what would be done with it."""
    for checkpoint in checkpoints:
        show(f"{checkpoint.kind.value}: {checkpoint.path}")
        for name, value in checkpoint.detail.items():
            if value not in (None, [], {}):
                show(f"    {name}: {_short(value)}")
        refusal = find_refusal(checkpoint)
        show(
            f"    would be refused: {refusal.what}" if refusal else f"    {_WOULD[checkpoint.kind]}"
        )


def show_cleaned(cleaned: Cleaned, *, dry_run: bool) -> None:
    """Show what was removed, or would be, and how much that is."""
    for path, size_bytes in cleaned.removed[:_SHOWN]:
        say(f"{show_bytes(size_bytes):>10}  {path}")
    if (more := len(cleaned.removed) - _SHOWN) > 0:
        say(f"{'':>10}  … and {more} more")
    would = "would be " if dry_run else ""
    say(f"{show_bytes(cleaned.freed_bytes):>10}  {would}removed")
    say(f"{show_bytes(cleaned.kept_bytes):>10}  of models kept")


def show_consolidated(sharded: Checkpoint, made: Checkpoint) -> None:
    """Show what was made of what."""
    show(f"from       {sharded.kind.value}: {sharded.path}")
    show(f"{made.kind.value:<10} {made.path}")


def _short(value: object) -> str:
    items = list(map(str, value)) if isinstance(value, list | tuple | set) else [str(value)]
    return ", ".join(items[:8]) + (f", … ({len(items)})" if len(items) > 8 else "")
