"""The picture of a start: one bar for each stage, and for the files that took longest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from loader.timeline import Open, Span
from loader.units import show_seconds

MOST_FILES = 12
_LEAST_SHARE = 0.01  # of the whole; files that took less are not drawn
_WIDTH, _LEFT, _RIGHT = 960, 250, 70  # pixels; the names stand on the left
_ROW, _BAR, _TOP, _BOTTOM = 24, 15, 30, 12
_LEGEND_STEP = 110
_CHARACTER = 7  # about as wide as one of the font
_MOST_TICKS = 8
_LABEL_CHARACTERS = 34
_COLOURS = {"podloader": "#3b6fb6", "engine": "#d9822b"}
_FILE, _FAILED, _STOPPED, _OTHER = "#8fb3a5", "#c0392b", "#a9a9a9", "#7d6fb0"


@dataclass(frozen=True, slots=True)
class _Bar:
    label: str
    start_s: float
    end_s: float
    colour: str
    note: str


def gantt_svg(spans: Sequence[Span], running: Sequence[Open], now_s: float) -> str:
    """Return an SVG document of *spans*, and of what is *running* until *now_s*."""
    stages = _bars(spans, running, now_s, "stage")
    files = _bars(spans, running, now_s, "file")
    total_s = max([bar.end_s for bar in (*stages, *files)], default=0.0) or 1.0
    bars = [*stages, *_longest(files, _LEAST_SHARE * total_s)]
    scale = (_WIDTH - _LEFT - _RIGHT) / total_s
    bottom = _TOP + _ROW * max(len(bars), 1)
    height = bottom + _ROW + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for tick in _ticks(total_s):
        x = _LEFT + tick * scale
        parts.append(
            f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{bottom}" '
            f'stroke="#e3e3e3"/><text x="{x:.1f}" y="{_TOP - 12}" text-anchor="middle" '
            f'fill="#777777">{tick:g} s</text>'
        )
    for row, bar in enumerate(bars):
        parts.append(_draw(bar, _TOP + row * _ROW, scale))
    parts += [*_legend(bars, bottom + _BAR // 2), "</svg>\n"]
    return "\n".join(parts)


def _bars(spans: Sequence[Span], running: Sequence[Open], now_s: float, kind: str) -> list[_Bar]:
    over = [span for span in spans if span.kind == kind]
    open_now = [span for span in running if span.kind == kind]
    bars = [
        *(
            _Bar(s.name, s.start_s, s.end_s, _colour(s), f"{show_seconds(s.seconds)}{_why(s)}")
            for s in over
        ),
        *(
            _Bar(s.name, s.start_s, now_s, _colour(s), f"{show_seconds(now_s - s.start_s)} …")
            for s in open_now
        ),
    ]
    return sorted(bars, key=lambda bar: (bar.start_s, bar.end_s))


def _longest(files: Sequence[_Bar], least_s: float) -> list[_Bar]:
    """Return the files that took longest, as they began."""
    found = [bar for bar in files if bar.end_s - bar.start_s >= least_s]
    found.sort(key=lambda bar: bar.start_s - bar.end_s)
    return sorted(found[:MOST_FILES], key=lambda bar: (bar.start_s, bar.end_s))


def _why(span: Span) -> str:
    return f" {span.failed or 'stopped'}" if span.note else ""


def _colour(span: Span | Open) -> str:
    if isinstance(span, Span) and span.note:
        return _FAILED if span.failed else _STOPPED
    return _FILE if span.kind == "file" else _COLOURS.get(span.lane, _OTHER)


def _draw(bar: _Bar, y: int, scale: float) -> str:
    x, width = _LEFT + bar.start_s * scale, max((bar.end_s - bar.start_s) * scale, 1.5)
    text_y = y + _BAR - 3
    label = bar.label
    if len(label) > _LABEL_CHARACTERS:
        label = "…" + label[1 - _LABEL_CHARACTERS :]
    return (
        f"<g><title>{escape(bar.label)}: {show_seconds(bar.start_s)} to "
        f"{show_seconds(bar.end_s)}</title>"
        f'<text x="{_LEFT - 8}" y="{text_y}" text-anchor="end" fill="#333333">{escape(label)}'
        f'</text><rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="2" '
        f'fill="{bar.colour}"/>{_note(bar.note, x, width, text_y)}</g>'
    )


def _note(text: str, x: float, width: float, y: int) -> str:
    """Return *text* behind the bar; where there is no room, in the bar or before it."""
    needed = len(text) * _CHARACTER + 10
    place, anchor, colour = x + width + 5, "start", "#555555"
    if place + needed > _WIDTH:
        inside = width > needed
        place, anchor = (x + width - 5 if inside else x - 5), "end"
        colour = "#ffffff" if inside else colour
    return (
        f'<text x="{place:.1f}" y="{y}" text-anchor="{anchor}" fill="{colour}">'
        f"{escape(text)}</text>"
    )


def _legend(bars: Sequence[_Bar], y: int) -> list[str]:
    """Return what the colours mean, of those that are there."""
    meanings = {**{c: name for name, c in _COLOURS.items()}, _FILE: "a file"}
    meanings |= {_FAILED: "failed", _STOPPED: "stopped"}
    used = {bar.colour for bar in bars}
    shown = [(colour, name) for colour, name in meanings.items() if colour in used]
    return [
        f'<rect x="{x}" y="{y}" width="{_BAR}" height="{_BAR}" rx="2" fill="{colour}"/>'
        f'<text x="{x + _BAR + 6}" y="{y + _BAR - 3}" fill="#555555">{name}</text>'
        for x, (colour, name) in zip(range(_LEFT, _WIDTH, _LEGEND_STEP), shown, strict=False)
    ]


def _ticks(total_s: float) -> list[float]:
    """Return round numbers of seconds, at most eight steps of them."""
    power = 1e-3
    while True:
        for step in (power, 2 * power, 5 * power):
            if total_s / step <= _MOST_TICKS:
                return [round(i * step, 6) for i in range(int(total_s / step + 1e-9) + 1)]
        power *= 10
