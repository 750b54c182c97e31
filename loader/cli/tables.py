"""What people read of a command's result; `documents` has the same as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from loader.cli.report import say, show
from loader.prepare.cleaning import Cleaned
from loader.status.table import timeline_lines
from loader.timeline import Timeline
from loader.types import Checkpoint, Kind, Manifest, ReadyModel, Snapshot, total_bytes
from loader.units import show_bytes, show_rate, show_seconds
from loader.weights.formats.refused import find_refusal
from loader.weights.formats.serving import serving_files
from loader.weights.header import Header

if TYPE_CHECKING:
    from loader.prepare.forecast import Forecast

_SHOWN = 50
_LONGEST = 80
_ENGINES = {"vllm": "vLLM", "transformers": "transformers"}
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


def show_plan(found: Forecast, folder: Path, free_bytes: int) -> None:
    """Show the files with those of the base, the sums, what is done with them, and the room."""
    manifest, base = found.manifest, found.base
    files = [(a.size_bytes, manifest.presence.get(a.path), a.path) for a in manifest.files]
    of_base = [(file.size_bytes, file.presence, file.path) for file in found.base_files]
    for size, presence, path in [*files, *of_base][:_SHOWN]:
        show(f"{_size(size)}  {_HERE[presence]:15}  {path}")
    if (more := len(files) + len(of_base) - _SHOWN) > 0:
        show(f"{'':>10}  … and {more} more")
    _show_sum([size for size, _, _ in files], f"-> {folder}")
    _show_unused(manifest)
    if base is not None and of_base:
        _show_sum(
            [size for size, _, _ in of_base], f"of the base, from {base.origin} -> {base.folder}"
        )
        _show_sum([size for size, _, _ in [*files, *of_base]], "in all")
    if not found.room:
        show(f"{show_bytes(free_bytes):>10}  free")
    _show_start(found)
    for warning in (*manifest.warnings, *found.warnings):
        show(f"warning: {warning}")


def _show_start(found: Forecast) -> None:
    """Show how the engine is started, the room that all of it takes, and when the URLs end."""
    if found.mode:
        way = {"as it is": "served as it is", "attach": "adapters attached", "merge": "merged"}
        first = "consolidated, then " if found.consolidates else ""
        show(f"start       {_ENGINES[found.engine]}, {first}{way[found.mode]}: {found.why}")
    if found.share:
        size = "" if found.share_bytes is None else f", {show_bytes(found.share_bytes)}"
        show(f"this node   {found.share}{size}")
    if found.weights_from:
        of = "from " if found.weights_from.startswith("files") else ""
        show(f"weights     loaded {of}{found.weights_from}")
    if found.base is not None and not found.base_files:
        show(f"base        {found.base.name}, on this machine")
    for room in found.room:
        have = "?" if room.have_bytes is None else show_bytes(room.have_bytes)
        place = f" free in {room.folder}" if room.folder else ""
        show(f"{room.what:<10}  {show_bytes(room.needed_bytes)} of {have}{place}: {room.why}")
    if found.urls_end is not None:
        left = (found.urls_end - datetime.now(UTC)).total_seconds()
        when = f"in {show_seconds(left)}" if left > 0 else f"{show_seconds(-left)} ago"
        show(f"URLs end    {found.urls_end:%Y-%m-%d %H:%M} UTC, {when}")


def _show_sum(sizes: Sequence[int | None], told: str) -> None:
    known = [size for size in sizes if size is not None]
    unknown = len(sizes) - len(known)
    rest = f", {unknown} of them of unknown size" if unknown else ""
    total = _size(sum(known) if known or not unknown else None)
    show(f"{total}  {len(sizes)} files{rest} {told}")


def _size(count: int | None) -> str:
    return f"{'?' if count is None else show_bytes(count):>10}"


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
    show(f"{_size(total)}  {text}")


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


def show_file(path: Path, header: Header) -> None:
    """Show what one safetensors file holds."""
    tensors = list(header.tensors.values())
    dtypes = Counter(tensor.dtype for tensor in tensors)
    show(f"safetensors: {path}")
    show(f"    size: {show_bytes(path.stat().st_size)}")
    show(f"    parameters: {sum(math.prod(t.shape) for t in tensors):,} in {len(tensors)} tensors")
    show(f"    dtypes: {', '.join(f'{dtype} ({n})' for dtype, n in dtypes.most_common())}")
    for name, value in header.metadata.items():
        show(f"    metadata {name}: {_cut(value)}")
    for tensor in tensors[:_SHOWN]:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        show(f"    {tensor.dtype:<5} {shape:>14}  {tensor.name}")
    if (more := len(tensors) - _SHOWN) > 0:
        show(f"    … and {more} more; --json has them all")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


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
