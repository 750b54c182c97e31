"""Places where the files of ``job1`` lie, one of each sort of source, for the contract suite."""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import fsspec

from loader.config.settings import Settings
from loader.stores.registry import Stores
from loader.types import Artifact, Listing
from tests.origin import FaultyOrigin, write_listing
from tests.stores import moto
from tests.stores.api import KEY, Api

JOB = "job1"


class Place(ABC):
    """One place. ``version_changes_with`` every write; ``tells_sums`` is of its ``stat``."""

    tells_sums = False

    @abstractmethod
    def put(self, name: str, content: bytes, rank: int = 0) -> None:
        """Write a file of the job."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Take it away."""

    @abstractmethod
    def source(self) -> str:
        """Return what ``--artifacts`` takes, as things are now."""

    def settings(self) -> dict[str, Any]:
        """Return the settings that the place needs."""
        return {}

    def stores(self) -> Stores:
        """Return the stores that a run with these settings has."""
        return Stores(Settings.without_config({"retries": 1} | self.settings()))

    def listing(self, stores: Stores) -> Listing:
        """Return the job's listing."""
        (listing,) = stores.read_listings(self.source(), (JOB,))
        return listing

    def artifact(self, stores: Stores, name: str) -> Artifact:
        """Return one file of it."""
        return next(a for a in self.listing(stores).artifacts if a.relative_file_name == name)


class SignedListing(Place):
    """A listing file of URLs that are signed in SigV2's form."""

    def __init__(self, origin: FaultyOrigin, folder: Path) -> None:
        self.origin, self.folder = origin, folder

    def put(self, name: str, content: bytes, rank: int = 0) -> None:
        self.origin.put(name, content, JOB, rank)

    def remove(self, name: str) -> None:
        (self.origin.folder(JOB) / name).unlink()

    def source(self) -> str:
        return str(write_listing(self.origin, self.folder / "listing.json"))


class ListingUrl(SignedListing):
    """The same, behind a signed URL of its own."""

    def source(self) -> str:
        path = write_listing(self.origin, self.origin.root / "listing.json")
        return self.origin.sign(path.name)


class RestApi(SignedListing):
    """The platform's REST API, which gives two files a page."""

    def __init__(self, origin: FaultyOrigin, api: Api, folder: Path) -> None:
        super().__init__(origin, folder)
        self.api = api

    def source(self) -> str:
        return "baseten"

    def settings(self) -> dict[str, Any]:
        return {"api_url": self.api.url}

    def stores(self) -> Stores:
        secrets = {"baseten_api_key": KEY}
        own = {"retries": 1} | self.settings()
        return Stores(Settings.without_config(own, secrets=secrets))


class Bucket(Place):
    """S3 in the platform's layout."""

    tells_sums = True
    prefix = f"training_projects/demo/jobs/{JOB}/"
    root = ""

    def __init__(self, url: str) -> None:
        self.url = url
        self.bucket = f"bucket-{uuid.uuid4().hex}"
        self.s3 = moto.client(url)
        self.s3.create_bucket(Bucket=self.bucket)

    def put(self, name: str, content: bytes, rank: int = 0) -> None:
        key = f"{self.prefix}rank-{rank}/{name}"
        self.s3.put_object(Bucket=self.bucket, Key=key, Body=content, ChecksumAlgorithm="CRC32C")

    def remove(self, name: str) -> None:
        self.s3.delete_object(Bucket=self.bucket, Key=f"{self.prefix}rank-0/{name}")

    def source(self) -> str:
        return f"s3://{self.bucket}{self.root}"

    def settings(self) -> dict[str, Any]:
        return {"s3_endpoint_url": self.url}

    def stores(self) -> Stores:
        secrets = {"aws_access_key_id": moto.ACCESS_KEY, "aws_secret_access_key": moto.SECRET_KEY}
        own = {"retries": 1} | self.settings()
        return Stores(Settings.without_config(own, secrets=secrets))


class PlainBucket(Bucket):
    """S3 with the ranks right below a prefix."""

    prefix, root = "my runs/plain+/", "/my runs/plain+/"


class SigV4Listing(Bucket):
    """A listing file of URLs that boto3 signed in SigV4's form."""

    tells_sums = False

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__(url)
        self.folder = folder

    def source(self) -> str:
        entries = []
        for entry in self.s3.list_objects_v2(Bucket=self.bucket).get("Contents", ()):
            rank, _, name = entry["Key"].removeprefix(self.prefix).partition("/")
            params = {"Bucket": self.bucket, "Key": entry["Key"]}
            url = self.s3.generate_presigned_url("get_object", Params=params)
            entries.append(
                {
                    "url": url,
                    "relative_file_name": name,
                    "node_rank": int(rank.removeprefix("rank-")),
                }
            )
        path = self.folder / "listing.json"
        path.write_text(json.dumps({"job": {"id": JOB}, "checkpoint_artifacts": entries}))
        return str(path)


class FileSystem(Place):
    """A folder of this machine, as the user names it."""

    scheme = "file"

    def __init__(self, root: str) -> None:
        self.root = root
        self.system = fsspec.filesystem(self.scheme)

    def put(self, name: str, content: bytes, rank: int = 0) -> None:
        path = f"{self.root}/{JOB}/rank-{rank}/{name}"
        self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.system.pipe_file(path, content)

    def remove(self, name: str) -> None:
        self.system.rm_file(f"{self.root}/{JOB}/rank-0/{name}")

    def source(self) -> str:
        return f"{self.scheme}://{self.root}"


class Memory(FileSystem):
    """fsspec's memory."""

    scheme = "memory"
