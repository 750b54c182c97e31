"""podloader's wheel as a Truss brings it along, and what that Truss asks an index for."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import io
import json
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from truss.base.truss_config import TrussConfig

import loader
from loader.errors import ConfigError, DiskError
from loader.scaffold.wheel import AUDIO, INSTALL, REQUIREMENTS, add_wheel, lines_to_add
from loader.serve.vllm.releases import PROVED
from tests.images import TEMPLATES, build_context, lay_out

PACKAGE = Path(loader.__file__).parent
NAMES = sorted(path.parent.name for path in TEMPLATES.glob("*/config.yaml"))
NEWEST = f"=={PROVED[-1]}"
UV = (sys.executable, "-m", "uv", "pip")


@pytest.fixture
def truss(tmp_path: Path) -> Path:
    (tmp_path / "truss").mkdir()
    (tmp_path / "truss/config.yaml").write_text("model_name: mine\n")
    return tmp_path / "truss"


def test_all_of_the_package_is_in_it_and_recorded(truss: Path) -> None:
    with zipfile.ZipFile(add_wheel(truss)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for path in PACKAGE.rglob("*.py"):
        assert files[path.relative_to(PACKAGE.parent).as_posix()] == path.read_bytes()
    (record,) = (name for name in files if name.endswith("/RECORD"))
    rows = {name: (digest, size) for name, digest, size in csv.reader(_lines(files[record]))}
    assert rows.pop(record) == ("", "")
    assert rows.keys() == files.keys() - {record}
    for name, (digest, size) in rows.items():
        whole = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).decode()
        assert digest == f"sha256={whole.rstrip('=')}"
        assert int(size) == len(files[name])


def _lines(text: bytes) -> io.StringIO:
    return io.StringIO(text.decode())


def test_it_is_installed_into_an_empty_environment(truss: Path, tmp_path: Path) -> None:
    made = add_wheel(truss)
    venv.create(tmp_path / "python", with_pip=False, symlinks=True)
    install = ("install", "--offline", "--no-deps", "--python", str(tmp_path / "python/bin/python"))
    done = subprocess.run([*UV, *install, made], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = subprocess.check_output([tmp_path / "python/bin/podloader", "--version"], text=True)
    assert found == f"podloader {loader.__version__}\n"


def test_an_older_one_goes(truss: Path) -> None:
    first = add_wheel(truss).read_bytes()
    (truss / "data/podloader-0.0.1-py3-none-any.whl").touch()
    (truss / "data/mine.json").touch()
    made = add_wheel(truss)
    assert {path.name for path in made.parent.iterdir()} == {made.name, "mine.json"}
    assert made.read_bytes() == first


def test_another_machine_makes_one_for_any(truss: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_platform", lambda: "macosx-14.0-arm64")
    made = add_wheel(truss)
    assert made.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(made) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".pyc"))]


def test_what_is_no_truss_and_what_cannot_be_written(truss: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no Truss lies there"):
        add_wheel(tmp_path)
    (truss / "data").touch()
    with pytest.raises(DiskError, match="could not be written"):
        add_wheel(truss)


def test_a_copy_that_was_never_installed(truss: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", none)
    with pytest.raises(ConfigError, match="not installed"):
        add_wheel(truss)
    assert not (truss / "data").exists()


def test_the_command_says_what_is_still_to_be_written(truss: Path) -> None:
    command = [sys.executable, "-m", "loader", "truss", "wheel", str(truss), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert Path(json.loads(done.stdout)["wheel"]).is_file()
    assert INSTALL in done.stderr
    assert all(needed in done.stderr for needed in REQUIREMENTS)
    shutil.copy(TEMPLATES / "vllm-server/config.yaml", truss)
    assert lines_to_add(truss) == ()


@pytest.mark.parametrize("name", NAMES)
def test_a_template_is_built_as_it_lies_there(name: str, tmp_path: Path) -> None:
    context = build_context(lay_out(name, tmp_path / "truss"), tmp_path / "context")
    (brought,) = (context / "data").glob("*.whl")
    lines = (context / "Dockerfile").read_text().splitlines()
    copied = next(i for i, line in enumerate(lines) if line.endswith("./data ${APP_HOME}/data"))
    (installed,) = (
        i for i, line in enumerate(lines) if line.removeprefix("RUN").strip() == INSTALL
    )
    assert copied < installed
    assert brought.name.startswith("podloader-")


@pytest.mark.parametrize("name", NAMES)
def test_a_templates_requirements_are_pinned_to_what_was_tested(name: str) -> None:
    config = TrussConfig.from_yaml(TEMPLATES / name / "config.yaml")
    asked = {r.name: str(r.specifier) for r in map(Requirement, config.requirements)}
    assert asked.pop("vllm", NEWEST) == NEWEST
    pins = (TEMPLATES.parent / ".ci/constraints.txt").read_text().splitlines()
    lines = [*(line for line in pins if line[:1].isalnum()), "torch==2.13.0"]
    tested = {pin.name: str(pin.specifier) for pin in map(Requirement, lines)}
    assert asked == {name: tested[name] for name in asked}
    assert set(REQUIREMENTS) <= set(config.requirements)
    assert (set(AUDIO) <= set(config.requirements)) == (name == "whisper")


@pytest.mark.engine
@pytest.mark.parametrize("name", ["custom-architecture", "vllm-model", "whisper"])
def test_an_index_has_all_that_the_image_asks_for(name: str, tmp_path: Path) -> None:
    """What podloader's wheel needs is listed, or comes with what is, or with the image."""
    context = build_context(lay_out(name, tmp_path / "truss"), tmp_path / "context")
    listed = (context / "requirements.txt").read_text().splitlines()
    lines = [line for line in listed if not line.startswith("-i ")]  # any index will do
    if TrussConfig.from_yaml(context / "config.yaml").base_image:
        lines.append(f"vllm{NEWEST}")
    (brought,) = (context / "data").glob("*.whl")
    (context / "asked.txt").write_text("\n".join([*lines, f"podloader @ {brought.as_uri()}"]))
    command = [*UV, "compile", "-q", "--python-version", "3.12", "--annotation-style", "line"]
    command += ["--index-strategy", "unsafe-best-match", "-c", "constraints.txt", "asked.txt"]
    done = subprocess.run(command, cwd=context, capture_output=True, text=True, check=False)
    if done.returncode and "No solution" not in done.stderr:
        pytest.skip(f"no index of packages: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    found = dict(line.split("  # via ") for line in done.stdout.splitlines() if "  # via " in line)
    assert any("podloader" in asked_by for asked_by in found.values())
    assert not [package for package, asked_by in found.items() if asked_by.strip() == "podloader"]
