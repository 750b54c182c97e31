"""What is written goes where it is said, whatever others have laid there before."""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loader.arriving.standins import EnginePath
from loader.errors import DiskError
from loader.fetch.completed import write_completed
from loader.fetch.sum_manifests import sum_folder
from loader.scaffold.wheel import write_wheel
from loader.status.trace import write_timeline
from loader.timeline import Timeline
from loader.types import Manifest
from loader.weights.publishing import PartialFolder, replace_file
from loader.weights.resuming import ResumableWriter
from loader.weights.writer import TensorSpec, plan_shards

KEPT = b"somebody's"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A file that is nobody's to write to here, in a folder of its own."""
    path = tmp_path / "foreign/file"
    path.parent.mkdir(0o755)
    path.write_bytes(KEPT)
    return path


def _write_sums(folder: Path) -> Path:
    (folder / "a").write_bytes(b"a")
    return sum_folder(folder)[0]


def _write_completed(folder: Path) -> Path:
    write_completed(folder, "key", Manifest(()))
    return folder / ".podloader/completed/key"


WRITERS: dict[str, Callable[[Path], Path]] = {
    "sums": _write_sums,
    "completed": _write_completed,
    "timeline": lambda folder: write_timeline(Timeline(quiet=True), folder / "t.json")[0],
    "wheel": write_wheel,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("plant", [os.symlink, os.link])
def test_no_name_that_can_be_guessed_is_written_to(
    writer: str, plant: Callable[[Path, Path], None], tmp_path: Path, foreign: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = WRITERS[writer](folder)
    for name in (f".{path.name}", f".{path.name}.{os.getpid()}", f"{path.name}.{os.getpid()}"):
        plant(foreign, path.with_name(name))
    path.unlink()
    plant(foreign, path)
    assert WRITERS[writer](folder) == path
    assert foreign.read_bytes() == KEPT
    assert not path.is_symlink()
    assert path.read_bytes() != KEPT


def test_a_file_that_cannot_be_replaced_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="directory"):
        replace_file(tmp_path / "x", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def _plan(tmp_path: Path) -> ResumableWriter:
    shards = plan_shards([TensorSpec("t", "F32", (4,))])
    return ResumableWriter(tmp_path / "out", shards, stem="model", plan="p", digest=zlib.crc32)


def _kept(tmp_path: Path) -> Path:
    """The folder that a run that failed leaves to the next."""
    with pytest.raises(ZeroDivisionError), _plan(tmp_path) as writer:
        raise ZeroDivisionError
    return writer.path


@pytest.mark.parametrize("to", ["file", ".", "nowhere"])
def test_a_planted_symlink_is_no_folder_of_an_earlier_run(
    to: str, tmp_path: Path, foreign: Path
) -> None:
    kept = _kept(tmp_path)
    for path in kept.iterdir():
        path.unlink()
    kept.rmdir()
    kept.symlink_to(foreign.parent / to)
    with _plan(tmp_path) as writer:
        writer.write("t", torch.ones(4))
    assert [path.name for path in foreign.parent.iterdir()] == ["file"]
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "written.jsonl.new"])
@pytest.mark.parametrize("plant", [os.symlink, os.link])
def test_what_an_earlier_run_left_is_not_written_through(
    name: str, plant: Callable[[Path, Path], None], tmp_path: Path, foreign: Path
) -> None:
    kept = _kept(tmp_path)
    (kept / name).unlink(missing_ok=True)
    plant(foreign, kept / name)
    try:
        with _plan(tmp_path) as writer:
            writer.write("t", torch.ones(4))
    except DiskError:
        assert (name, plant) == ("model.safetensors", os.symlink)
    assert foreign.read_bytes() == KEPT


def test_an_engines_folder_is_no_symlink(tmp_path: Path, foreign: Path) -> None:
    (tmp_path / ".engine-0").symlink_to(foreign.parent)
    with pytest.raises(DiskError):
        EnginePath.take(tmp_path)
    assert stat.S_IMODE(foreign.parent.stat().st_mode) == 0o755


def test_a_folder_is_published_whole(tmp_path: Path) -> None:
    with PartialFolder(tmp_path / "out") as partial:
        (partial.path / "x").write_bytes(b"x")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out/x").read_bytes() == b"x"
