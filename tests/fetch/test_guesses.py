"""ETags that look like an MD5: what they mean is learned per origin; what is declared refuses."""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from loader.errors import FetchError
from loader.fetch.snapshot import FetchOptions, fetch
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest
from tests.origin import FaultyOrigin, flip

CONTENTS = {f"{i}.bin": random.Random(i).randbytes(3000 + i) for i in range(8)}
LARGE = random.Random(9).randbytes(3 << 20)
ALONE = FetchOptions(concurrency=1)
S3 = {"x-amz-request-id": "1"}


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def tag(value: str) -> dict[str, str]:
    return S3 | {"ETag": f'"{value}"'}


def manifest_of(origin: FaultyOrigin, contents: Mapping[str, bytes]) -> Manifest:
    paths = {name: origin.put(name, content) for name, content in contents.items()}
    return Manifest(
        tuple(
            Artifact("job1", 0, name, origin.sign(path.relative_to(origin.root).as_posix()))
            for name, path in paths.items()
        )
    )


def tell(origin: FaultyOrigin, headers: Callable[[str, bytes], Mapping[str, str]]) -> None:
    """Let *headers* say what is told of a file by its name and content."""
    origin.headers = lambda path: headers(
        path.rpartition("/")[2], (CONTENTS | {"large.bin": LARGE})[path.rpartition("/")[2]]
    )


@pytest.mark.parametrize("form", ["{}", "{}-1", "{}-3"])
def test_what_is_no_md5_is_found_out_once(
    origin: FaultyOrigin,
    store: PresignedStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    form: str,
) -> None:
    tell(origin, lambda name, content: tag(form.format(md5(name.encode()))))
    fetch(manifest_of(origin, CONTENTS), tmp_path, store)
    for name, content in CONTENTS.items():
        assert (tmp_path / "job1/rank-0" / name).read_bytes() == content
    compared = form != "{}-3"  # of parts of a size that nobody tells
    assert len(origin.requests) == len(CONTENTS) + compared
    assert caplog.text.count("look like an MD5 and are none") == compared
    assert "Signature" not in caplog.text


def test_a_larger_file_is_read_again_whole(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    tell(origin, lambda name, content: tag(md5(name.encode())))
    manifest = manifest_of(origin, {"large.bin": LARGE})
    fetch(manifest, tmp_path, store, FetchOptions(range_bytes=1 << 20, concurrency=3))
    assert (tmp_path / "job1/rank-0/large.bin").read_bytes() == LARGE
    assert len(origin.requests) == 3  # its beginning, all of it, and all of it once more


def test_where_they_have_fitted_one_that_does_not_refuses(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    tell(origin, lambda name, content: tag(md5(b"" if name == "7.bin" else content)))
    with pytest.raises(FetchError, match="sum up to what the origin says"):
        fetch(manifest_of(origin, CONTENTS), tmp_path, store, ALONE)
    assert len(origin.ranges_of("7.bin")) == 1  # nothing is left to be learned
    assert not (tmp_path / "job1/rank-0/7.bin").exists()


def test_the_first_one_is_damaged_and_the_next_ones_prove_it(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    tell(origin, lambda name, content: tag(md5(b"" if name == "0.bin" else content)))
    manifest = manifest_of(origin, CONTENTS)
    with pytest.raises(FetchError, match="do not sum up to their ETags") as caught:
        fetch(manifest, tmp_path, store, ALONE)
    assert caught.value.problems == ("job1/rank-0/0.bin",)
    assert not (tmp_path / "job1/rank-0/0.bin").exists()
    assert not list(tmp_path.rglob("0.bin.record"))
    origin.headers = lambda path: {}
    fetch(manifest, tmp_path, store, ALONE)


def test_bytes_that_turn_over_on_the_way_are_not_taken(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    tell(origin, lambda name, content: tag(md5(content)))
    manifest = manifest_of(origin, {"0.bin": CONTENTS["0.bin"]})
    origin.fail("0.bin", flip(7))
    with pytest.raises(FetchError, match="sum up"):
        fetch(manifest, tmp_path, store, ALONE)
    assert len(origin.requests) == 2
    fetch(manifest, tmp_path, store, ALONE)
    assert (tmp_path / "job1/rank-0/0.bin").read_bytes() == CONTENTS["0.bin"]


def test_an_object_that_changes_before_it_is_read_again(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    origin.headers = lambda path: S3 | {"ETag": f'"{md5(str(origin.requests).encode())}"'}
    manifest = manifest_of(origin, {"0.bin": CONTENTS["0.bin"]})
    with pytest.raises(FetchError, match="sum up"):
        fetch(manifest, tmp_path, store, ALONE)


def encoded(content: bytes, algorithm: str = "md5") -> str:
    return base64.b64encode(hashlib.new(algorithm, content).digest()).decode()


DECLARED: dict[str, Callable[[bytes], dict[str, str]]] = {
    "x-amz-checksum-sha256": lambda c: {"x-amz-checksum-sha256": encoded(c, "sha256")},
    "Repr-Digest": lambda c: {"Repr-Digest": f"sha-256=:{encoded(c, 'sha256')}:"},
    "Digest": lambda c: {"Digest": f"SHA-256={encoded(c, 'sha256')},MD5={encoded(c)}"},
    "x-goog-hash": lambda c: {"x-goog-hash": f"md5={encoded(c)}"},
}


@pytest.mark.parametrize("kind", DECLARED)
def test_what_is_declared_refuses(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path, kind: str
) -> None:
    contents = {"0.bin": CONTENTS["0.bin"]}
    tell(origin, lambda name, content: DECLARED[kind](content) | tag(md5(b"no md5")))
    fetch(manifest_of(origin, contents), tmp_path / "right", store, ALONE)
    tell(origin, lambda name, content: DECLARED[kind](b"other") | tag(md5(content)))
    origin.requests.clear()
    with pytest.raises(FetchError, match="sum up"):
        fetch(manifest_of(origin, contents), tmp_path / "wrong", store, ALONE)
    assert len(origin.requests) == 1


def test_content_md5_is_of_the_whole_in_an_answer_that_holds_it(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    contents = {"0.bin": CONTENTS["0.bin"]}
    tell(origin, lambda name, content: {"Content-MD5": encoded(b"other")})
    ranges = FetchOptions(range_bytes=1 << 20)
    large = manifest_of(origin, {"large.bin": LARGE})
    fetch(large, tmp_path / "range", store, ranges)  # of the range, for all that is known
    manifest = manifest_of(origin, contents)
    with pytest.raises(FetchError, match="sum up"):
        fetch(manifest, tmp_path / "all of it", store, ALONE)

    def whole(handler: object) -> bool:
        del handler.headers["Range"]  # type: ignore[attr-defined]
        return False

    origin.fail("0.bin", whole, whole)  # the first is not believed on a kept connection
    with pytest.raises(FetchError, match="sum up"):
        fetch(manifest, tmp_path / "whole", store, ALONE)


def test_an_empty_file_has_a_sum_too(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    manifest = manifest_of(origin, {"0.bin": b""})
    for content, is_right in ((b"", True), (b"something", False)):
        headers = {"Repr-Digest": f"sha-256=:{encoded(content, 'sha256')}:"}
        origin.headers = lambda path, headers=headers: headers  # type: ignore[misc]
        place = tmp_path / str(is_right)
        if is_right:
            fetch(manifest, place, store, ALONE)
        else:
            with pytest.raises(FetchError, match="sum up"):
                fetch(manifest, place, store, ALONE)
