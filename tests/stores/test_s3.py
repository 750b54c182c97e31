"""S3 against moto's server: layouts, pages, credentials, signatures that end, refusals."""

from __future__ import annotations

import hashlib
import io
import logging
import random
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loader.config.settings import Settings
from loader.errors import ConfigError, FetchError, ListingError, TransientError
from loader.fetch.snapshot import FetchOptions, fetch
from loader.http.body import HttpStream
from loader.http.client import HttpClient
from loader.http.objects import Checksum
from loader.stores.base import SMALL_BYTES
from loader.stores.registry import Stores
from loader.types import Manifest
from tests.stores import moto
from tests.stores.front import Front

SECRETS = {"aws_access_key_id": moto.ACCESS_KEY, "aws_secret_access_key": moto.SECRET_KEY}


@pytest.fixture
def s3(s3_url: str) -> Any:
    return moto.client(s3_url)


@pytest.fixture
def bucket(s3: Any) -> str:
    name = f"bucket-{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=name)
    return name


_open: list[Stores] = []


@pytest.fixture(autouse=True)
def close_stores() -> Iterator[None]:
    yield
    while _open:
        _open.pop().close()


def open_stores(s3_url: str, secrets: dict[str, str] | None = None, **own: Any) -> Stores:
    settings = Settings.without_config(
        {"s3_endpoint_url": s3_url, "retries": 0} | own,
        secrets=SECRETS if secrets is None else secrets,
    )
    _open.append(Stores(settings))
    return _open[-1]


def put(s3: Any, bucket: str, *keys: str) -> None:
    for key in keys:
        s3.put_object(Bucket=bucket, Key=key, Body=b"123")


@pytest.mark.parametrize(
    ("keys", "source", "expected"),
    [
        (
            ["training_projects/p/jobs/j1/rank-0/a", "training_projects/q/jobs/j2/rank-1/a"],
            "",
            {"j1/rank-0/a", "j2/rank-1/a"},
        ),
        (["training_projects/p/jobs/j1/rank-0/a"], "/training_projects/", {"j1/rank-0/a"}),
        (["training_projects/p/jobs/j1/rank-0/a"], "/training_projects/p", {"j1/rank-0/a"}),
        (["training_projects/p/jobs/j1/rank-0/a"], "/training_projects/p/jobs/", {"j1/rank-0/a"}),
        (["training_projects/p/jobs/j1/rank-0/a"], "/training_projects/p/jobs/j1", {"j1/rank-0/a"}),
        (
            ["own/x/j1/rank-0/a", "own/x/j2/rank-12/b/c"],
            "/own/x",
            {"j1/rank-0/a", "j2/rank-12/b/c"},
        ),
        (["own/j1/rank-0/a", "own/j1/rank-00/b", "own/j1/rank-x/c"], "/own/j1/", {"j1/rank-0/a"}),
        (["rank-0/", "rank-0/a", "rank-0/b/"], "", {"j1/rank-0/a"}),
        (["own/j10/rank-0/a", "own/j1/rank-0/a"], "/own", {"j1/rank-0/a"}),
    ],
)
def test_layouts(
    s3: Any, s3_url: str, bucket: str, keys: list[str], source: str, expected: set[str]
) -> None:
    put(s3, bucket, *keys)
    jobs = ("j1", "j2") if any("j2" in path for path in expected) else ("j1",)
    listings = open_stores(s3_url).read_listings(f"s3://{bucket}{source}", jobs)
    assert {a.path for listing in listings for a in listing.artifacts} == expected


def test_without_a_job_all_are_found(s3: Any, s3_url: str, bucket: str) -> None:
    put(s3, bucket, *[f"training_projects/p/jobs/j{i}/rank-0/a" for i in range(3)])
    listings = open_stores(s3_url).read_listings(f"s3://{bucket}")
    assert [listing.job for listing in listings] == ["j0", "j1", "j2"]


def test_a_job_is_not_taken_for_another(s3: Any, s3_url: str, bucket: str) -> None:
    put(s3, bucket, "training_projects/p/jobs/j1/rank-0/a", "plain/rank-0/a")
    stores = open_stores(s3_url)
    for source in ("", "/training_projects/p/jobs/j1"):
        with pytest.raises(ListingError, match="no folder of a training job"):
            stores.read_listings(f"s3://{bucket}{source}", ("j9",))
    with pytest.raises(ListingError, match="which job"):
        stores.read_listings(f"s3://{bucket}/plain", ("j1", "j2"))


def test_a_folder_without_ranks_is_taken_as_it_is(s3: Any, s3_url: str, bucket: str) -> None:
    put(s3, bucket, "llama/config.json", "llama/original/params.json", "llama/.cache/x/rank-0/y")
    (listing,) = open_stores(s3_url).read_listings(f"s3://{bucket}/llama")
    assert "llama/rank-0/config.json" in {a.path for a in listing.artifacts}
    (again,) = open_stores(s3_url).read_listings(f"s3://{bucket}/llama", ("llama",))
    assert again == listing
    with pytest.raises(ListingError, match="no folder"):
        open_stores(s3_url).read_listings(f"s3://{bucket}/llama", ("j1",))


def test_two_folders_of_one_job(s3: Any, s3_url: str, bucket: str) -> None:
    put(s3, bucket, *[f"training_projects/{p}/jobs/j1/rank-0/a" for p in ("p", "q")])
    with pytest.raises(ListingError, match="two folders"):
        open_stores(s3_url).read_listings(f"s3://{bucket}", ("j1",))


def test_more_files_than_a_page(
    s3: Any, s3_url: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loader.stores.s3._PAGE_SIZE", 2)
    put(s3, bucket, *[f"j1/rank-0/{i:04d}" for i in range(7)])
    (listing,) = open_stores(s3_url).read_listings(f"s3://{bucket}/j1", ("j1",))
    assert len(listing.artifacts) == 7
    assert all(a.size_bytes == 3 for a in listing.artifacts)


def upload_parts(s3: Any, bucket: str, key: str, parts: Sequence[bytes]) -> None:
    upload = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    done = [
        {
            "PartNumber": i,
            "ETag": s3.upload_part(
                Bucket=bucket, Key=key, UploadId=upload, PartNumber=i, Body=part
            )["ETag"],
        }
        for i, part in enumerate(parts, 1)
    ]
    s3.complete_multipart_upload(
        Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": done}
    )


def md5_of_parts(parts: Sequence[bytes]) -> bytes:
    return hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).digest()


@pytest.mark.parametrize(("sizes", "told"), [((5, 5, 1), 5), ((5, 5, 5), 5), ((6, 5, 7), None)])
def test_sums_of_parts_and_how_large_they_are(
    s3: Any, s3_url: str, bucket: str, sizes: Sequence[int], told: int | None
) -> None:
    parts = [bytes([i]) * (size << 20) for i, size in enumerate(sizes)]
    upload_parts(s3, bucket, "j1/rank-0/big", parts)
    stores = open_stores(s3_url)
    (listing,) = stores.read_listings(f"s3://{bucket}", ("j1",))
    expected = Checksum("md5", md5_of_parts(parts), 3, told and told << 20)
    assert stores.stat(listing.artifacts[0]).checksums == (expected,)


def test_an_upload_in_parts_is_proved_by_its_etag(
    s3: Any, s3_url: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [random.Random(i).randbytes(5 << 20) for i in range(3)] + [b"end"]
    upload_parts(s3, bucket, "j1/rank-0/big", parts)
    stores = open_stores(s3_url)
    (listing,) = stores.read_listings(f"s3://{bucket}", ("j1",))
    manifest = Manifest(listing.artifacts)
    options = FetchOptions(range_bytes=1 << 20, concurrency=3)
    read = HttpStream.readinto
    left = [7 << 20]

    def flips(stream: HttpStream, buffer: memoryview) -> int:
        count = read(stream, buffer)
        before, left[0] = left[0], left[0] - count
        if before > 0 >= left[0]:
            buffer[0] ^= 1
        return count

    with monkeypatch.context() as patch:
        patch.setattr(HttpStream, "readinto", flips)
        with pytest.raises(FetchError, match="sum up") as caught:
            fetch(manifest, tmp_path, stores, options)
    assert md5_of_parts(parts).hex() in caught.value.expected
    fetch(manifest, tmp_path, stores, options)
    assert (tmp_path / "j1/rank-0/big").read_bytes() == b"".join(parts)


def test_what_boto3_uploads_in_parts_is_proved_by_its_etag(
    s3: Any, s3_url: str, bucket: str, tmp_path: Path
) -> None:
    content = random.Random(4).randbytes((20 << 20) + 9)  # boto3's parts are of 8 MiB
    s3.upload_fileobj(io.BytesIO(content), bucket, "j1/rank-0/big")
    told = s3.head_object(Bucket=bucket, Key="j1/rank-0/big", ChecksumMode="ENABLED")
    assert told["ETag"].endswith('-3"')
    assert "-" not in told["ChecksumCRC32"]  # moto says no more of what it is of
    stores = open_stores(s3_url)
    (listing,) = stores.read_listings(f"s3://{bucket}", ("j1",))
    (checksum,) = stores.stat(listing.artifacts[0]).checksums
    assert (checksum.algorithm, checksum.parts, checksum.part_bytes) == ("md5", 3, 8 << 20)
    fetch(Manifest(listing.artifacts), tmp_path, stores)
    assert (tmp_path / "j1/rank-0/big").read_bytes() == content


@pytest.mark.parametrize("parts", ["", "-1"])
def test_etags_that_are_no_md5_hinder_no_one_as_they_do_not_hinder_boto3(
    s3: Any,
    s3_url: str,
    bucket: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    parts: str,
) -> None:
    contents = {f"{i}.json": random.Random(i).randbytes(3000) for i in range(5)}
    with closing_front(s3_url) as front:
        front.tag = lambda tag: f'"{hashlib.md5(tag.encode()).hexdigest()}{parts}"'
        plain = moto.client(s3_url)
        for name, content in contents.items():
            plain.put_object(Bucket=bucket, Key=f"j1/rank-0/{name}", Body=content)
        reference = moto.client(front.url)
        stores = open_stores(front.url)
        (listing,) = stores.read_listings(f"s3://{bucket}", ("j1",))
        for drops in (True, False):  # what else is told decides before any ETag does
            front.drop = {"connection", "date", "x-amz-checksum-crc32" if drops else ""}
            fetch(Manifest(listing.artifacts), tmp_path / str(drops), stores)
            for name, content in contents.items():
                got = io.BytesIO()
                reference.download_fileobj(bucket, f"j1/rank-0/{name}", got)
                found = (tmp_path / str(drops) / "j1/rank-0" / name).read_bytes()
                assert found == got.getvalue() == content
    # Where parts are spoken of, a CRC without a type may be of theirs: it decides nothing.
    assert caplog.text.count("look like an MD5 and are none") == (2 if parts else 1)


@contextmanager
def closing_front(s3_url: str) -> Iterator[Front]:
    front = Front(s3_url)
    yield front
    front.stop()


def test_the_largest_of_small_files_takes_one_request(
    s3: Any, s3_url: str, bucket: str, tmp_path: Path
) -> None:
    """A larger one would be asked for what it is first."""
    content = random.Random(10).randbytes(SMALL_BYTES)
    s3.put_object(Bucket=bucket, Key="j1/rank-0/a.bin", Body=content)
    with closing_front(s3_url) as front:
        stores = open_stores(front.url)
        (listing,) = stores.read_listings(f"s3://{bucket}", ("j1",))
        before = len(front.asked)
        found = fetch(Manifest(listing.artifacts), tmp_path, stores)
        assert [span for _, span in front.asked[before:]] == [""]
    assert (tmp_path / found.files[0].path).read_bytes() == content


@pytest.mark.parametrize("refuses", [False, True])
def test_a_small_object_is_proved_by_what_its_one_answer_tells(
    s3: Any,
    s3_url: str,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuses: bool,
) -> None:
    content = random.Random(9).randbytes(3000)
    s3.put_object(Bucket=bucket, Key="j1/rank-0/small", Body=content)
    stores = open_stores(s3_url)
    (listing,) = stores.read_listings(f"s3://{bucket}", ("j1",))
    get, asked = HttpClient.get, []

    def noted(client: HttpClient, url: str, **more: Any) -> HttpStream:
        asked.append(more)
        if refuses and more.get("headers"):
            raise FetchError("the service does not know this header", where=url)
        return get(client, url, **more)

    def flips(stream: HttpStream, buffer: memoryview) -> int:
        count = read(stream, buffer)
        buffer[0] ^= left.pop() if left else 0
        return count

    read, left = HttpStream.readinto, [1]
    monkeypatch.setattr(HttpClient, "get", noted)
    with monkeypatch.context() as patch:
        patch.setattr(HttpStream, "readinto", flips)
        with pytest.raises(FetchError, match="sum up"):
            fetch(Manifest(listing.artifacts), tmp_path, stores)
    assert len(asked) == (3 if refuses else 1)  # an ETag alone is tried by another read
    fetch(Manifest(listing.artifacts), tmp_path, stores)
    assert (tmp_path / "j1/rank-0/small").read_bytes() == content


@pytest.mark.parametrize(("used_s", "signatures"), [(300.0, 1), (0.0, 3)])
def test_signatures_are_made_anew_in_time(
    s3: Any,
    s3_url: str,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    used_s: float,
    signatures: int,
) -> None:
    put(s3, bucket, "j1/rank-0/a")
    stores = open_stores(s3_url)
    (listing,) = stores.read_listings(f"s3://{bucket}", ("j1",))
    info = stores.stat(listing.artifacts[0])
    seen: set[str] = set()
    get = stores._trusted.get

    def note(url: str, **more: Any) -> Any:
        seen.add(url)
        return get(url, **more)

    monkeypatch.setattr(stores._trusted, "get", note)
    monkeypatch.setattr("loader.stores.s3._USED_S", used_s)
    for seconds in (900, 901, 902):
        monkeypatch.setattr("loader.stores.s3._SIGNED_S", seconds)  # another signature
        stores.open_range(listing.artifacts[0], 0, 3, info).close()
    assert len(seen) == signatures


def test_credentials_come_from_boto3s_chain(
    s3: Any, s3_url: str, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put(s3, bucket, "j1/rank-0/a")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_url)

    def read() -> int:
        stores = open_stores("", {}, s3_endpoint_url=None)
        (listing,) = stores.read_listings(f"s3://{bucket}", ("j1",))
        return stores.stat(listing.artifacts[0]).size_bytes

    with pytest.raises(ConfigError, match="no credentials"):
        read()
    (tmp_path / "credentials").write_text("[other]\naws_access_key_id=a\naws_secret_access_key=b\n")
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert read() == 3
    monkeypatch.setenv("AWS_PROFILE", "none")
    with pytest.raises(ConfigError, match="no credentials"):
        read()


def test_a_session_token_and_region_from_one_secret(
    s3: Any, s3_url: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3, bucket, "j1/rank-0/a")
    secret = (
        '{"aws_access_key_id": "S3CR3T-a", "aws_secret_access_key": "S3CR3T-b", '
        '"aws_session_token": "S3CR3T-c", "aws_region": "eu-north-1"}'
    )
    stores = open_stores(s3_url, {"aws_secret_json": secret})
    (listing,) = stores.read_listings(f"s3://{bucket}", ("j1",))
    url = stores._s3._get_url(listing.artifacts[0])
    assert "X-Amz-Security-Token=S3CR3T-c" in url
    assert "S3CR3T" not in repr(stores._settings)
    with pytest.raises(ConfigError, match="half"):
        open_stores(s3_url, {"aws_access_key_id": "S3CR3T-a"})
    with pytest.raises(ConfigError, match="no JSON object") as caught:
        open_stores(s3_url, {"aws_secret_json": "S3CR3T"})
    assert "S3CR3T" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "kind", "said"),
    [
        ("s3://no-such-bucket-anywhere/x", FetchError, "no such bucket"),
        ("s3://", ConfigError, "without a bucket"),
        ("s3://Not_A_Bucket!/x", ConfigError, "not a place"),
    ],
)
def test_places_that_are_none(s3_url: str, source: str, kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        open_stores(s3_url).read_listings(source, ("j1",))


def test_nobody_there(s3_url: str) -> None:
    stores = open_stores("http://127.0.0.1:9", connect_timeout_s=0.5)
    with pytest.raises(TransientError, match="did not answer"):
        stores.read_listings("s3://bucket", ("j1",))


def test_no_secret_in_a_log(
    s3: Any, s3_url: str, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(s3, bucket, "j1/rank-0/a")
    with caplog.at_level(logging.INFO):
        stores = open_stores(s3_url)
        (listing,) = stores.read_listings(f"s3://{bucket}", ("j1",))
        stores.stat(listing.artifacts[0])
    assert "S3CR3T" not in caplog.text
    assert "X-Amz" not in caplog.text


def test_boto3_is_not_imported_for_other_sources(tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text('{"job": {"id": "j"}, "checkpoint_artifacts": []}')
    script = (
        "import sys\nfrom loader.config.settings import Settings\n"
        "from loader.stores.registry import Stores\n"
        f"Stores(Settings.without_config()).read_listings({str(tmp_path / 'l.json')!r})\n"
        "print({'boto3', 'botocore', 'fsspec'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
