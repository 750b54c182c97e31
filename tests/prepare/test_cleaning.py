"""What earlier runs left is removed, and nothing that somebody still has in his hands."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loader.fetch.digests import Digests
from loader.prepare.cleaning import clean
from loader.prepare.consolidated import models_folder
from loader.weights.publishing import scratch_folder, use

DAY_S = 86_400


def write(path: Path, content: bytes = b"x" * 5000, *, days: float = 2) -> Path:
    """Write a file that is so many days old."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (time.time() - days * DAY_S,) * 2)
    return path


def model(root: Path, name: str, *, days: float, size: int = 1 << 20) -> Path:
    """Make a derived model that was used so many days ago."""
    folder = write(models_folder(root) / name / "model.safetensors", bytes(size), days=days).parent
    os.utime(folder, (time.time() - days * DAY_S,) * 2)
    return folder


def removed(root: Path, **how: object) -> set[str]:
    cleaned = clean(root, models_folder(root), **how)  # type: ignore[arg-type]
    return {path.relative_to(root).as_posix() for path, _ in cleaned.removed}


def test_parts_and_records_that_nobody_needs(tmp_path: Path) -> None:
    files = tmp_path / ".podloader/files/job1/rank-0"
    for name in ("old", "young", "held", "whole"):
        days = 0 if name == "young" else 2
        write(files / f"{name}.part", days=days)
        write(files / f"{name}.journal", days=days)
    write(files / "alone.journal")
    write(files / "gone.record")
    write(files / "whole.record")
    whole = write(tmp_path / "job1/rank-0/whole")
    with (files / "held.part").open("r+b") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        expected = {"old.part", "old.journal", "alone.journal", "gone.record"}
        expected |= {"whole.part", "whole.journal"}
        place = files.relative_to(tmp_path).as_posix()
        told = {f"{place}/{name}" for name in expected}
        assert removed(tmp_path, dry_run=True) == told
        assert removed(tmp_path) == told
        assert removed(tmp_path) == set()
    left = {path.name for path in files.iterdir()}
    assert left == {"young.part", "young.journal", "held.part", "held.journal", "whole.record"}
    assert whole.exists()
    assert removed(tmp_path, older_than_days=0) == {
        f"{place}/{name}.{kind}" for name in ("young", "held") for kind in ("part", "journal")
    }


def test_models_down_to_a_size(tmp_path: Path) -> None:
    oldest = model(tmp_path, "merge-0000000000000001", days=9)
    middle = model(tmp_path, "consolidate-0000000000000002", days=5)
    newest = model(tmp_path, "attach-0000000000000003", days=1)
    base = models_folder(tmp_path) / "bases/llama-abc"
    write(base / "rank-0/model.safetensors", bytes(1 << 20), days=7)
    record = write(base.parent / ".podloader/files/llama-abc/rank-0/model.safetensors.record")
    assert removed(tmp_path) == set()
    assert removed(tmp_path, keep_bytes=5 << 20) == set()
    place = models_folder(tmp_path).relative_to(tmp_path).as_posix()
    told = {f"{place}/{oldest.name}", f"{place}/bases/{base.name}"}
    assert removed(tmp_path, keep_bytes=5 << 19, dry_run=True) == told
    assert record.exists()
    assert removed(tmp_path, keep_bytes=5 << 19) == told
    assert not oldest.exists()
    assert not base.exists()
    assert not record.exists()
    use(middle)
    cleaned = clean(tmp_path, models_folder(tmp_path), keep_bytes=0)
    assert [path for path, _ in cleaned.removed] == [newest]
    assert cleaned.freed_bytes >= 1 << 20
    assert cleaned.kept_bytes >= 1 << 20
    assert middle.exists()


def test_a_model_that_is_used_is_the_last_to_go(tmp_path: Path) -> None:
    used = model(tmp_path, "merge-0000000000000001", days=9)
    other = model(tmp_path, "merge-0000000000000002", days=5)
    script = "import sys; from pathlib import Path; from loader.weights.publishing import use\n"
    subprocess.run([sys.executable, "-c", f"{script}use(Path(sys.argv[1]))", used], check=True)
    assert removed(tmp_path, keep_bytes=3 << 19) == {other.relative_to(tmp_path).as_posix()}


def test_what_killed_writers_left_and_stale_digests(tmp_path: Path) -> None:
    cache = models_folder(tmp_path)
    for name, days in ((".merge-1.abc.partial", 2), (".consolidate-1.plan.partial", 0)):
        left = write(cache / name / "x").parent
        os.utime(left, (time.time() - days * DAY_S,) * 2)
    digests = Digests(cache / "digests")
    kept, changed = write(tmp_path / "kept"), write(tmp_path / "changed")
    time.sleep(0.1)
    for path in (kept, changed):
        digests.of(path, "sha256")
    changed.write_bytes(b"y")
    with scratch_folder(cache, "merging") as living:
        assert len(removed(tmp_path)) == 2
        assert living.exists()
    assert not (cache / ".merge-1.abc.partial").exists()
    assert left.exists()  # it may be gone on with
    (entry,) = digests.folder.iterdir()
    assert json.loads(entry.read_bytes())["path"] == str(kept)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loader", "clean", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("by_config", [False, True])
def test_the_command(tmp_path: Path, by_config: bool) -> None:
    root = tmp_path / "down"
    folder = model(root, "merge-0000000000000001", days=9)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"training_checkpoints: {{download_folder: {root}, artifact_references: "
        "[{training_job_id: j, paths: [a]}]}"
    )
    place = str(config if by_config else root)
    done = run(place, "--keep", "1GiB", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["removed"] == []
    done = run(place, "--keep", "0", "--dry-run")
    assert "would be removed" in done.stderr
    assert folder.exists()
    done = run(place, "--keep", "0", "--json")
    assert [entry["path"] for entry in json.loads(done.stdout)["removed"]] == [str(folder)]
    assert not folder.exists()
    for words in (("--keep", "much"), ("--older-than", "-1"), ("--older-than", "nan")):
        assert run(place, *words).returncode == 2
    assert run(str(tmp_path / "none")).returncode == 2
