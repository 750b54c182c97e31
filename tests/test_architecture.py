"""The house: imports point down, heavy ones stay in the room that owns them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import LAYERS, LOADER, draw_map, shown_map

OWNERS = {
    "torch": {"weights", "adapters", "serve", "demo"},
    "transformers": {"weights", "serve", "demo"},
    "peft": {"serve", "demo"},
    "vllm": {"serve"},
    "httptools": {"http"},
    "huggingface_hub": {"stores"},
    "boto3": {"stores"},
    "fsspec": {"stores"},
    "rich": {"cli"},
    "yaml": {"config", "demo", "scaffold"},
    "msgspec": {"config", "fetch"},
    "tenacity": {"retry", "fetch"},
    "awscrt": {"fetch"},
    "starlette": {"truss", "serve"},
    "opentelemetry": {"status"},
    "prometheus_client": {"status"},
    "uvloop": {"serve"},
    "ray": {"ray_cluster", "nodes"},
}
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "vllm",
    "boto3",
    "huggingface_hub",
    "fsspec",
    "opentelemetry",
    "prometheus_client",
    "ray",
)


def room_of(path: Path) -> str:
    return path.relative_to(LOADER).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return sorted(path for path in LOADER.rglob("*.py") if path != LOADER / "__init__.py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            if node.module == "loader":
                yield from (f"loader.{alias.name}" for alias in node.names)


def level(room: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if room in layer)


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(LOADER).as_posix())
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    for name in imports(path):
        if name.startswith("loader.") and not name.startswith("loader.__"):
            other = name.split(".")[1]
            assert other == room or level(other) < level(room), f"{room} imports {name}"
        package = name.split(".")[0]
        assert room in OWNERS.get(package, {room}), f"{room} imports {package}"


def test_one_file_knows_the_inside_of_vllm() -> None:
    inside = {p for p in modules() for name in imports(p) if name.startswith("vllm.")}
    assert not inside, "it imports them by the tables of loader/serve/vllm/private.py"
    spoken_to = {p for p in modules() if "vllm" in imports(p)}
    assert {p.relative_to(LOADER).parts[:2] for p in spoken_to} <= {("serve", "vllm")}


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in found.stdout.split()}


@pytest.mark.parametrize(
    "module",
    [
        "loader",
        "loader.cli",
        "loader.boot",
        "loader.truss.hook",
        "loader.prepare.consolidated",
        "loader.prepare.adapted",
        "loader.prepare.ready",
        "loader.prepare.remote",
        "loader.scaffold.folder",
    ],
)
def test_nothing_heavy_comes_with_the_front_rooms(module: str) -> None:
    assert not loaded_by(f"import {module}") & set(HEAVY)


def test_the_command_line_waits_for_no_room() -> None:
    assert not loaded_by("import loader.cli") & {"pydantic", "pydantic_settings", "awscrt", "yaml"}


def test_the_map_is_the_house() -> None:
    assert shown_map() == draw_map(), "`python -m tests.house` draws it anew"


def test_no_two_files_bear_one_name() -> None:
    names = [path.name for path in modules() if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))
