"""The engine's one path: stand-ins with whole headers, then the model, never half of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loader.arriving.standins import EnginePath, is_stand_in
from tests.filling import SlowFolder


@pytest.fixture
def filling(tmp_path: Path) -> SlowFolder:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file({"a": torch.ones(1 << 20)}, source / "model.safetensors")
    return SlowFolder(source, tmp_path / "filling")


def test_stand_ins_have_all_but_the_weights(filling: SlowFolder, tmp_path: Path) -> None:
    taken = EnginePath.take(tmp_path / "cache")
    taken.stand_in(filling)
    assert (taken.path / "config.json").read_text() == "{}"
    with safe_open(taken.path / "model.safetensors", "pt") as file:
        assert file.get_slice("a").get_shape() == [1 << 20]
    assert (taken.path / "model.safetensors").stat().st_blocks * 512 < 1 << 16
    assert is_stand_in(taken.path)
    assert taken.path.parent.stat().st_mode & 0o777 == 0o700
    taken.publish(tmp_path / "source")
    assert taken.path.resolve() == tmp_path / "source"
    assert not is_stand_in(taken.path)
    taken.clear()
    assert (taken.path / "config.json").exists()
    taken.release()
    assert not list(taken.path.parent.iterdir())


def test_the_path_is_the_same_in_every_pod_and_each_has_its_own(
    filling: SlowFolder, tmp_path: Path
) -> None:
    first, second = EnginePath.take(tmp_path), EnginePath.take(tmp_path)
    assert first.path != second.path
    first.stand_in(filling)
    (first.path / "left").touch()  # by a killed process
    first.release()
    again = EnginePath.take(tmp_path)
    assert again.path == first.path
    again.stand_in(filling)
    assert not (again.path / "left").exists()
    again.release()
    second.release()
