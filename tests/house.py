"""The house as it stands: its layers, and the map that CONTRIBUTING.md shows of them.

``python -m tests.house`` draws the map anew.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOADER = ROOT / "loader"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"

# A room may import what stands below it, and itself.
LAYERS = [
    {"errors", "units"},
    {
        "types",
        "timeline",
        "retry",
        "threads",
        "import_lock",
        "parent",
        "log_lines",
        "json_text",
        "ray_cluster",
    },
    {"config"},
    {"http"},
    {"weights"},
    {"resolve", "stores"},
    {"fetch", "adapters"},
    {"arriving", "peers"},
    {"status"},
    {"serve"},
    {"prepare"},
    {"boot"},
    {"truss", "demo", "pod", "scaffold", "nodes"},
    {"cli"},
    {"__main__"},
]
_BEGIN, _END = "<!-- map: python -m tests.house -->\n```\n", "```\n<!-- end of the map -->\n"
_WIDTH = 24


def draw_map() -> str:
    """Return the rooms from the top layer down, each with the first line of its docstring."""
    lines = ["loader/\n"]
    for layer in reversed(LAYERS):
        for room in sorted(layer):
            lines += _draw_room(LOADER / room, 1)
    return "".join(lines)


def _draw_room(place: Path, depth: int) -> Iterator[str]:
    module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    name = "  " * depth + place.name + ("/" if place.is_dir() else "")
    yield f"{name:{_WIDTH}}{text.splitlines()[0]}\n"
    if place.is_dir():
        for inner in sorted(path.parent for path in place.glob("*/__init__.py")):
            yield from _draw_room(inner, depth + 1)


def shown_map() -> str:
    """Return the map that CONTRIBUTING.md shows."""
    return CONTRIBUTING.read_text(encoding="utf-8").partition(_BEGIN)[2].partition(_END)[0]


if __name__ == "__main__":
    before, _, rest = CONTRIBUTING.read_text(encoding="utf-8").partition(_BEGIN)
    after = rest.partition(_END)[2]
    CONTRIBUTING.write_text(before + _BEGIN + draw_map() + _END + after, encoding="utf-8")
