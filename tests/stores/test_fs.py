"""What fsspec's drivers bring: options, versions, missing packages, failures of each sort."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from loader import boot
from loader.config.settings import Settings
from loader.errors import ChangedError, ConfigError, DeniedError, FetchError, TransientError
from loader.http.objects import Checksum
from loader.scaffold.selection import Selection
from loader.stores.base import Progress, Tell
from loader.stores.registry import Stores
from loader.types import Artifact


class Cloud(MemoryFileSystem):  # type: ignore[misc]
    """A driver with options and failures, as those of clouds have."""

    protocol = "cloud"
    store: dict[str, Any] = {}  # noqa: RUF012 - the base's way of sharing
    pseudo_dirs = [""]  # noqa: RUF012
    failure: Exception | None = None
    told: dict[str, object] = {}  # noqa: RUF012
    after_read: Any = None

    def __init__(self, token: str = "", **options: Any) -> None:
        if token == "wrong":
            raise ValueError("S3CR3T in a message")
        super().__init__(**options)
        self.token = token

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("cloud://").strip("/")

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        if self.failure:
            raise self.failure
        return {**super().info(path, **options), **self.told}

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        if self.failure:
            raise self.failure
        data: bytes = super().cat_file(path, start, end, **options)
        if type(self).after_read:
            type(self).after_read()
        return data


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Cloud]]:
    fsspec.register_implementation("cloud", Cloud, clobber=True)
    monkeypatch.setattr(Cloud, "store", {})
    yield Cloud
    Cloud.failure, Cloud.after_read, Cloud.told = None, None, {}
    Cloud.clear_instance_cache()


@pytest.fixture
def stores() -> Stores:
    return Stores(Settings.without_config({"storage_options": {"cloud": {"token": "S3CR3T"}}}))


def put(content: bytes, path: str = "/b/job1/rank-0/x") -> Artifact:
    system = Cloud()
    system.makedirs(path.rpartition("/")[0], exist_ok=True)
    system.pipe_file(path, content)
    return Artifact("job1", 0, "x", f"cloud://{path}", len(content))


def test_options_reach_the_driver(cloud: type[Cloud], stores: Stores) -> None:
    put(b"123")
    assert len(stores.read_listings("cloud://b", ("job1",))[0].artifacts) == 1
    assert stores._fs._systems["cloud"].token == "S3CR3T"
    assert "S3CR3T" not in repr(stores._settings)


def test_options_that_the_driver_refuses(cloud: type[Cloud]) -> None:
    for options in ({"token": "wrong"}, {"token": "wrong", "more": 1}):
        stores = Stores(Settings.without_config({"storage_options": {"cloud": options}}))
        with pytest.raises(ConfigError, match="does not start") as caught:
            stores.read_listings("cloud://b", ("job1",))
        assert "S3CR3T" not in str(caught.value)


def test_options_as_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PODLOADER_STORAGE_OPTIONS", '{"gs": {"token": "anon"}}')
    assert Settings.without_config().storage_options == {"gs": {"token": "anon"}}


@pytest.mark.parametrize(
    ("url", "package"),
    [
        ("gs://bucket/x", "gcsfs"),
        ("az://bucket/x", "adlfs"),
        ("sftp://h/x", "paramiko"),
        ("hdfs://h/x", "pyarrow"),
    ],
)
def test_a_package_that_is_missing_is_named(
    stores: Stores, url: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # some come with what other tests need
    with pytest.raises(ConfigError, match="not installed") as caught:
        stores.read_listings(url, ("job1",))
    assert caught.value.next_step == f"pip install {package}"


def test_what_nobody_knows(stores: Stores) -> None:
    with pytest.raises(ConfigError, match="nothing that podloader or fsspec knows"):
        stores.read_listings("gopher://x/y", ("job1",))
    with pytest.raises(ConfigError, match="chained"):
        stores.read_listings("simplecache::cloud://x", ("job1",))


class HttpError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"S3CR3T {status}")
        self.status = status


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (FileNotFoundError("x"), FetchError),
        (PermissionError("S3CR3T"), DeniedError),
        (TimeoutError(), TransientError),
        (ConnectionResetError(), TransientError),
        (HttpError(403), DeniedError),
        (HttpError(404), FetchError),
        (HttpError(400), FetchError),
        (HttpError(429), TransientError),
        (HttpError(503), TransientError),
        (RuntimeError("S3CR3T"), TransientError),
        (ValueError("S3CR3T"), FetchError),
        (OSError(errno.ELOOP, "a symlink to itself"), FetchError),
        (OSError(errno.EIO, "a disk"), TransientError),
    ],
)
def test_failures(
    cloud: type[Cloud], stores: Stores, failure: Exception, kind: type[FetchError]
) -> None:
    artifact = put(b"123")
    info = stores.stat(artifact)
    cloud.failure = failure
    with pytest.raises(FetchError) as caught:
        stores.stat(artifact)
    assert type(caught.value) is kind
    with pytest.raises(kind):
        stores.open_range(artifact, 0, 3, info).readinto(memoryview(bytearray(3)))
    assert "S3CR3T" not in str(caught.value)


def test_a_change_between_the_first_and_the_last_chunk(
    cloud: type[Cloud], stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loader.stores.fs._CHUNK_BYTES", 4)
    artifact = put(b"0123456789")
    info = stores.stat(artifact)
    stream = stores.open_range(artifact, 0, 10, info)
    buffer = memoryview(bytearray(100))
    assert stream.readinto(buffer) == 4
    put(b"9876543210")
    assert stream.readinto(buffer) == 4
    with pytest.raises(ChangedError):  # before the last bytes are handed out
        stream.readinto(buffer)


def test_a_change_that_shortens_the_file(cloud: type[Cloud], stores: Stores) -> None:
    artifact = put(b"0123456789")
    info = stores.stat(artifact)
    put(b"01")
    with pytest.raises(ChangedError):
        stores.open_range(artifact, 0, 10, info).readinto(memoryview(bytearray(10)))


def test_versions_and_sums_as_clouds_tell_them(cloud: type[Cloud], stores: Stores) -> None:
    artifact = put(b"123")
    md5, crc = bytes(range(16)), bytes(range(4))
    text = base64.b64encode(md5).decode()
    cloud.told = {"etag": '"1"', "md5Hash": text, "crc32c": base64.b64encode(crc).decode()}
    info = stores.stat(artifact)
    assert info.version == 'etag="1"'
    assert set(info.checksums) == {Checksum("md5", md5), Checksum("crc32c", crc)}
    cloud.told = {"content_settings": {"content_md5": bytearray(md5)}, "etag": "2"}
    assert stores.stat(artifact).checksums == (Checksum("md5", md5),)


def test_a_folder_of_this_machine_through_the_main_job(tmp_path: Path) -> None:
    folder = tmp_path / "share/job1/rank-0/checkpoint-1"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("notes")
    config = {
        "training_checkpoints": {
            "download_folder": str(tmp_path / "down"),
            "artifact_references": [{"training_job_id": "job1", "paths": ["rank-0/"]}],
        },
        "model_metadata": {"podloader": {"artifacts": f"file://{tmp_path}/share"}},
    }
    snapshot = boot.fetch_files(Settings.load(config))
    assert (snapshot.root / snapshot.files[0].path).read_text() == "notes"
    assert boot.fetch_files(Settings.load(config)).fetched_bytes == 0


def test_a_listing_may_name_files_where_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("123")
    entry = {"url": f"file://{tmp_path}/x", "relative_file_name": "x", "node_rank": 0}
    path = tmp_path / "listing.json"
    path.write_text(json.dumps({"job": {"id": "job1"}, "checkpoint_artifacts": [entry]}))
    stores = Stores(Settings.without_config({"allow_local_urls": "true"}))
    (listing,) = stores.read_listings(str(path))
    assert stores.stat(listing.artifacts[0]).size_bytes == 3


def test_two_servers_of_one_scheme(cloud: type[Cloud], stores: Stores) -> None:
    put(b"123")
    stores.read_listings("cloud://b", ("job1",))
    cloud._get_kwargs_from_urls = staticmethod(lambda url: {"host": uuid.uuid4().hex})
    try:
        with pytest.raises(ConfigError, match="two servers"):
            stores.read_listings("cloud://b", ("job1",))
    finally:
        del cloud._get_kwargs_from_urls


class Steps(Progress):
    """Keeps what it is told of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[Tell]:
        yield lambda how_far: self.told.append(f"{what} {how_far}")


def test_files_are_counted_as_they_are_listed(cloud: type[Cloud]) -> None:
    for number in range(1100):
        put(b"", f"/b/job1/rank-0/{number}")
    steps = Steps()
    own = {"storage_options": {"cloud": {"token": "S3CR3T"}}}
    stores = Stores(Settings.without_config(own), progress=steps)
    assert len(stores.read_listings("cloud://b")[0].artifacts) == 1100
    assert steps.told == ["listing 500 files", "listing 1,000 files"]
    assert stores.find_jobs("cloud://b") == ("job1",)
    assert len(steps.told) == 2, "by the names of folders"


def test_a_checkpoint_is_looked_for_with_the_settings(cloud: type[Cloud]) -> None:
    put(b'{"model_type": "llama"}', "/b/job1/rank-0/checkpoint-7/config.json")
    put(b"", "/b/job1/rank-0/checkpoint-7/model.safetensors")
    own = {"storage_options": {"cloud": {"token": "wrong"}}}
    with pytest.raises(ConfigError, match="does not start"):
        Selection("cloud://b", checkpoints=("latest",)).settings(own)
    own["storage_options"]["cloud"]["token"] = "S3CR3T"
    found = Selection("cloud://b", checkpoints=("latest",)).settings(own)
    assert found.training.artifact_references[0].paths == ("rank-0/checkpoint-7/",)


@pytest.mark.parametrize("put_there", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_an_empty_one(
    put_there: Callable[[Path], None], stores: Stores, tmp_path: Path
) -> None:
    put_there(tmp_path / "x")
    artifact = Artifact("job1", 0, "x", f"file://{tmp_path}/x")
    for ask in (stores.stat, lambda artifact: stores.open_first(artifact, 9)):
        with pytest.raises(FetchError, match="not a file"):
            ask(artifact)
