"""From references and listings to a manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from loader.errors import ListingError, ResolveError
from loader.resolve.manifest import check_index, resolve
from loader.types import Artifact, ArtifactReference, Listing, TrainingCheckpoints


def listing(*names: str, job: str = "j1", total_count: int | None = None) -> Listing:
    """Return a listing whose names are given as ``<rank>:<relative name>``."""
    artifacts = []
    for name in names:
        rank, _, relative = name.partition(":")
        url = f"https://s3.test/{job}/rank-{rank}/{relative}?Signature=secret"
        artifacts.append(Artifact(job, int(rank), relative, url))
    return Listing(job, tuple(artifacts), total_count)


def config(*paths: str, job: str = "j1") -> TrainingCheckpoints:
    return TrainingCheckpoints(Path("/tmp/t"), (ArtifactReference(job, paths),))


def test_overlapping_patterns_give_each_file_once_in_order() -> None:
    manifest = resolve(
        config("rank-0/b", "rank-*", "rank-?/b"), [listing("1:b", "0:b", "0:a with space+")]
    )
    assert [f.path for f in manifest.files] == [
        "j1/rank-0/a with space+",
        "j1/rank-0/b",
        "j1/rank-1/b",
    ]


def test_several_jobs() -> None:
    both = TrainingCheckpoints(
        Path("/t"), (ArtifactReference("j1", ("*",)), ArtifactReference("j2", ("rank-0/",)))
    )
    manifest = resolve(both, [listing("0:x"), listing("0:x", "1:y", job="j2")])
    assert [f.path for f in manifest.files] == ["j1/rank-0/x", "j2/rank-0/x"]


def test_unmatched_patterns_are_all_reported_with_the_nearest_names() -> None:
    with pytest.raises(ResolveError) as error:
        resolve(config("rank-0/checkpoint-42/", "nope*"), [listing("0:checkpoint-24/a.json")])
    assert len(error.value.problems) == 2
    assert "rank-0/checkpoint-24/" in error.value.problems[0]


def test_an_empty_listing() -> None:
    with pytest.raises(ResolveError) as error:
        resolve(config("*"), [listing()])
    assert error.value.problems == ("j1: '*'; its listing is empty",)


def test_listing_of_another_job() -> None:
    with pytest.raises(ListingError, match="no listing") as error:
        resolve(config("*", job="wanted"), [listing("0:a", job="other")])
    assert error.value.expected == "wanted"
    assert error.value.got == "other"


def test_short_listing_is_refused() -> None:
    with pytest.raises(ListingError, match="total_count"):
        resolve(config("*"), [listing("0:a", total_count=2)])


def test_a_star_that_crosses_folders_is_warned_of() -> None:
    manifest = resolve(config("rank-0/*.json"), [listing("0:a.json", "0:sub/b.json")])
    assert len(manifest.files) == 2
    assert "rank-0/sub/b.json" in manifest.warnings[0]
    assert not resolve(config("rank-*/c/"), [listing("0:c/b.json")]).warnings


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../../x",
        "/etc/x",
        "a\0b",
        "a//b",
        "./a",
        "a\\b",
        "",
        "a/",
        "x" * 250,
        "d/" * 120 + "x",
        "d/" * 1400 + "x",
        "a\nb/c",
        "x/" * 1500 + "x",
    ],
)
def test_names_that_leave_their_folder(name: str) -> None:
    with pytest.raises(ResolveError, match="refused"):
        resolve(config("*"), [listing(f"0:{name}")])


def test_job_id_that_is_a_path() -> None:
    with pytest.raises(ResolveError, match="refused"):
        resolve(config("*", job="../j"), [listing("0:a", job="../j")])


def test_file_and_folder_of_one_name() -> None:
    with pytest.raises(ResolveError) as error:
        resolve(config("*"), [listing("0:a", "0:a/b")])
    assert "also a file" in error.value.problems[0]


def test_letters_that_are_written_in_two_ways() -> None:
    names = listing("0:\u00e9.json", "0:e\u0301.json")
    assert len(resolve(config("*"), [names]).files) == 2
    with pytest.raises(ResolveError, match="refused"):
        resolve(config("*"), [names], case_sensitive=False)


def test_names_that_differ_only_in_case() -> None:
    names = listing("0:A.json", "0:a.json")
    assert len(resolve(config("*"), [names]).files) == 2
    with pytest.raises(ResolveError) as error:
        resolve(config("*"), [names], case_sensitive=False)
    assert "only in case" in error.value.problems[0]


def test_two_listings_of_one_job_that_disagree() -> None:
    first = Listing("j1", (Artifact("j1", 0, "a", "https://h/one"),))
    second = Listing("j1", (Artifact("j1", 0, "a", "https://h/two"),))
    with pytest.raises(ResolveError, match="one place"):
        resolve(config("*"), [first, second])
    assert len(resolve(config("*"), [first, first]).files) == 1


def test_missing_shards_are_all_named() -> None:
    names = [f"0:c/model-0000{i}-of-00005.safetensors" for i in (1, 3)]
    with pytest.raises(ResolveError) as error:
        resolve(config("rank-0/c/"), [listing(*names)])
    assert [p.rpartition("/")[2] for p in error.value.problems] == [
        f"model-0000{i}-of-00005.safetensors" for i in (2, 4, 5)
    ]


def test_shards_spread_over_ranks_are_whole() -> None:
    names = ["0:c/model-00001-of-00002.safetensors", "1:c/model-00002-of-00002.safetensors"]
    assert len(resolve(config("rank-*/c/"), [listing(*names)]).files) == 2


def test_index_that_names_absent_shards() -> None:
    listed = {"j1/rank-0/c/i.json", "j1/rank-1/c/a.safetensors"}
    check_index("j1", "rank-0/c/i.json", ["a.safetensors"], listed)
    with pytest.raises(ResolveError) as error:
        check_index("j1", "rank-0/c/i.json", ["z", "a.safetensors", "b"], listed)
    assert [p.split()[-1] for p in error.value.problems] == ["b", "z"]


@pytest.mark.parametrize("count", ["99999", "9" * 9, "9" * 5000])
def test_counts_in_names_are_not_counted_to(count: str) -> None:
    names = [f"0:c/m{i}-00001-of-{count}.safetensors" for i in range(300)]
    if len(count) > 9:  # no shard of anything
        assert len(resolve(config("rank-0/d"), [listing("0:d", *names)]).files) == 1
        return
    with pytest.raises(ResolveError) as caught:
        resolve(config("rank-0/c/"), [listing(*names)])
    assert caught.value.problems[0].endswith(f"/m0-00002-of-{count}.safetensors")
