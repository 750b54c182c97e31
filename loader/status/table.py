"""Where the seconds of a start went, as lines of text."""

from __future__ import annotations

from loader.timeline import Timeline

_BAR_CHARACTERS = 40


def timeline_lines(timeline: Timeline) -> list[str]:
    """Return a table: when each stage began and how long it took, the same as bars, the counts."""
    stages = sorted(timeline.stages, key=lambda stage: (stage.start_s, stage.end_s))
    total_s = max((stage.end_s for stage in stages), default=0.0) or 1.0
    lines = [f"{'start':>9}  {'seconds':>9}  stage"]
    for stage in stages:
        before = round(stage.start_s / total_s * _BAR_CHARACTERS)
        length = max(round(stage.end_s / total_s * _BAR_CHARACTERS) - before, 1)
        bar = " " * min(before, _BAR_CHARACTERS - 1) + "█" * length
        note = f"  {stage.note}" if stage.note else ""
        lines.append(f"{stage.start_s:>9.2f}  {stage.seconds:>9.2f}  {stage.name:<20}  {bar}{note}")
    counted = sorted((name, number) for name, number in timeline.counts.items() if number)
    counts = ", ".join(f"{name.replace('_', ' ')}: {number}" for name, number in counted)
    return [*lines, f"{total_s:>9.2f}  in all{f'; {counts}' if counts else ''}"]
