"""The files alone, for a Truss that builds its own model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loader import fetch_checkpoints
from loader.errors import FetchError, ResolveError
from tests.origin import FaultyOrigin, status, write_listing


class Look:
    """Secrets as Truss gives them: looked up, never listed."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getitem__(self, key: str) -> str:
        self.asked.append(key)
        raise RuntimeError(key)

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("secrets are not to be listed")


def folders(origin: FaultyOrigin, tmp_path: Path, *patterns: str) -> list[str]:
    listing = write_listing(origin, tmp_path / "listing.json")
    config = {
        "training_checkpoints": {
            "download_folder": str(tmp_path / "down"),
            "artifact_references": [{"training_job_id": "job1", "paths": list(patterns)}],
        },
        "model_metadata": {"podloader": {"artifacts": [str(listing)]}},
    }
    secrets = Look()
    found = fetch_checkpoints(config, secrets)
    assert {"hf_access_token", "baseten_api_key"} <= set(secrets.asked)
    assert {"aws_access_key_id", "aws_secret_access_key"} <= set(secrets.asked)
    assert all(folder.is_dir() for folder in found)
    return [folder.relative_to(tmp_path / "down/job1").as_posix() for folder in found]


@pytest.fixture
def job(origin: FaultyOrigin) -> FaultyOrigin:
    for rank in (0, 1):
        origin.put("checkpoint-2/weights.pt", b"w", rank=rank)
        origin.put("checkpoint-10/parts/a/weights.pt", b"w", rank=rank)
    origin.put("notes.txt", b"n")
    return origin


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("rank-0/checkpoint-10/", ["rank-0/checkpoint-10"]),
        ("rank-*/checkpoint-2/", ["rank-0/checkpoint-2", "rank-1/checkpoint-2"]),
        ("rank-0/checkpoint-*/", ["rank-0/checkpoint-10", "rank-0/checkpoint-2"]),
        ("rank-1/", ["rank-1"]),
        ("rank-0/notes.txt", ["rank-0"]),
        ("rank-0/*.pt", ["rank-0/checkpoint-10/parts/a", "rank-0/checkpoint-2"]),
    ],
)
def test_the_folders_that_a_pattern_means(
    job: FaultyOrigin, tmp_path: Path, pattern: str, expected: list[str]
) -> None:
    assert folders(job, tmp_path, pattern) == expected


def test_in_the_order_of_the_patterns_each_once(job: FaultyOrigin, tmp_path: Path) -> None:
    patterns = ["rank-0/checkpoint-2/", "rank-0/checkpoint-10/", "rank-0/checkpoint-2/weights.pt"]
    assert folders(job, tmp_path, *patterns) == ["rank-0/checkpoint-2", "rank-0/checkpoint-10"]


def test_errors_are_those_of_every_fetch(job: FaultyOrigin, tmp_path: Path) -> None:
    with pytest.raises(ResolveError):
        folders(job, tmp_path, "rank-0/checkpoint-3/")
    job.fail("weights.pt", *[status(404)] * 9)
    with pytest.raises(FetchError):
        folders(job, tmp_path, "rank-0/checkpoint-2/")


def test_a_relative_listing_is_the_trusss(job: FaultyOrigin, tmp_path: Path) -> None:
    data = tmp_path / "truss/data"
    data.mkdir(parents=True)
    write_listing(job, data / "listing.json")
    references = [{"training_job_id": "job1", "paths": ["rank-0/checkpoint-2/"]}]
    checkpoints = {"download_folder": str(tmp_path / "down"), "artifact_references": references}
    own = {"podloader": {"artifacts": ["data/listing.json"]}}
    config = {"training_checkpoints": checkpoints, "model_metadata": own}
    (folder,) = fetch_checkpoints(config, data_dir=data)
    assert folder == tmp_path / "down/job1/rank-0/checkpoint-2"
