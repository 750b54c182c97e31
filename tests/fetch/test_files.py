"""The lock of a file is its part file's, and goes with it when that gets the file's name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loader.fetch import files
from loader.fetch.files import Places, lock_part, places
from loader.types import Artifact


@pytest.fixture
def place(tmp_path: Path) -> Places:
    found = places(tmp_path, Artifact("job1", 0, "a.bin", "http://h/a.bin", 1))
    found.final.parent.mkdir(parents=True)
    return found


def test_a_whole_file_that_is_locked_is_about_to_get_its_record(place: Places) -> None:
    first = lock_part(place)
    assert first is not None
    assert first[1]
    assert lock_part(place) is None
    Path(place.part).rename(place.final)
    assert lock_part(place) is None
    os.close(first[0])
    second = lock_part(place)
    assert second is not None
    assert not second[1]
    os.close(second[0])


def test_a_part_file_that_was_removed_before_it_was_locked(
    place: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = files._open_part
    removed: list[str] = []

    def overtaken(place: Places) -> int:
        fd, path = opening(place), place.part
        if not removed:
            removed.append(path)
            Path(path).unlink()
        return fd

    monkeypatch.setattr(files, "_open_part", overtaken)
    held = lock_part(place)
    assert held is not None
    fd, is_new = held
    assert os.path.samestat(os.fstat(fd), Path(place.part).stat())
    assert is_new
    os.close(fd)


def test_a_part_file_that_got_its_name_before_it_was_locked(
    place: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the whole file now, which nobody writes to: another part file is made."""
    opening = files._open_part

    def overtaken(place: Places) -> int:
        fd, path = opening(place), place.part
        if not place.final.exists():
            Path(path).rename(place.final)
        return fd

    monkeypatch.setattr(files, "_open_part", overtaken)
    held = lock_part(place)
    assert held is not None
    fd, is_new = held
    assert os.path.samestat(os.fstat(fd), Path(place.part).stat())
    assert not is_new
    os.close(fd)
