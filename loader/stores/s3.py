"""S3 and what speaks like it: boto3 finds credentials, lists and signs; our own client reads.

boto3 costs several times the CPU of a plain download, so bytes come through signed URLs, which are
made when they are needed and made anew before they or their credentials end. What boto3 itself asks
for comes through that client, too: its own has a limit for each wait, and none for all of them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from loader.config.credentials import S3Credentials, Secret
from loader.errors import ExpiredError, FetchError, LoaderError, TransientError
from loader.http.body import HttpStream
from loader.http.client import HttpClient
from loader.http.objects import ObjectInfo
from loader.retry import ask_again
from loader.stores.base import SMALL_BYTES, PendingResponse
from loader.stores.job_folders import StoredFile
from loader.stores.presigned import first_byte, open_url
from loader.stores.s3_errors import (
    is_absent,
    is_held,
    is_unknown,
    refusals_translated,
    translate_error,
    unanswered,
)
from loader.types import Artifact

SCHEME = "s3://"
_PAGE_SIZE = 1000  # the most that S3 gives
_PAGE_BYTES = 64 << 20  # of its longest keys, a few
_SIGNED_S = 900
_USED_S = 300.0  # boto3 renews temporary credentials when they have less than ten minutes left
_CHECKSUMS = {"x-amz-checksum-mode": "ENABLED"}
_Out = TypeVar("_Out")
_log = logging.getLogger("podloader")


@dataclass(frozen=True, slots=True)
class S3Options:
    """Which service, and as whom. What is None, boto3 finds by its own chain."""

    endpoint_url: str | None = None
    credentials: S3Credentials = field(default_factory=S3Credentials)
    retries: int = 6
    ca_bundle: Path | None = None


class S3Store:
    """A ``Store`` of artifacts ``s3://<bucket>/<key>``, and the ``Tree`` that they lie in."""

    def __init__(self, client: HttpClient, options: S3Options) -> None:
        self._client = client
        self._options = options
        self._lock = threading.Lock()
        self._s3: dict[str | None, Any] = {}  # boto3's clients, by region
        self._regions: dict[str, str] = {}  # of buckets that lie in another one than was said
        self._signed: dict[str, tuple[str, float]] = {}  # URL and when to sign anew, by artifact

    def stat(self, artifact: Artifact) -> ObjectInfo:
        """Return size, version and all checksums: those that S3 keeps come with HEAD alone."""
        url = self._sign(artifact, "head_object", {"ChecksumMode": "ENABLED"})
        try:
            return self._with_part_bytes(artifact, self._client.head(url, headers=_CHECKSUMS))
        except TransientError:
            raise
        except FetchError:
            # A refused HEAD has no body that says why, and some services refuse every HEAD.
            return self._with_url(
                artifact, lambda url: first_byte(self._client, url, artifact.size_bytes)
            )

    def open_first(self, artifact: Artifact, end: int) -> HttpStream:
        """Return the bytes ``[0, end)`` of the version there is now.

        They come with the whole object where that is small: S3 tells all checksums only then.
        """
        if end > SMALL_BYTES and (info := self.stat(artifact)).size_bytes:
            stream = self.open_range(artifact, 0, min(end, info.size_bytes), info)
            stream.info = info
            return stream
        url = self._sign(artifact, "get_object", {"ChecksumMode": "ENABLED"})
        try:
            stream = self._client.get(
                url, headers=_CHECKSUMS, size_bytes=artifact.size_bytes, is_object=True
            )
        except TransientError:
            raise
        except FetchError:  # some services refuse what they do not know
            return self._with_url(artifact, lambda url: self._client.get(url, span=(0, end)))
        stream.info = replace(stream.info, ranges=True)
        return stream

    def send_first(self, artifact: Artifact, end: int) -> PendingResponse:
        """Return what opens the bytes ``[0, end)`` of the version there is then."""
        return PendingResponse(partial(self.open_first, artifact, end))

    def open_range(
        self, artifact: Artifact, start: int, end: int, version: ObjectInfo
    ) -> HttpStream:
        """Return the bytes ``[start, end)`` of *version*."""
        return self._with_url(
            artifact, lambda url: open_url(self._client, url, start, end, version)
        )

    def listed_size(self, artifact: Artifact) -> None:
        """Return None: whoever lists its folders can list them again."""

    def close(self) -> None:
        """Drop every connection."""
        with self._lock:
            clients, self._s3 = list(self._s3.values()), {}
        for client in clients:
            client.close()
        self._client.close()

    def folders(self, path: str) -> Sequence[str]:
        """Return the names of the common prefixes directly below *path*."""
        names = []
        for page in self._pages(path, Delimiter="/"):
            names += [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
        return [name.rstrip("/").rpartition("/")[2] for name in names]

    def files(self, path: str) -> Iterator[StoredFile]:
        """Yield every object below *path*, but for those that stand for a folder."""
        skip = len(_key_prefix(path))
        for page in self._pages(path):
            for entry in page.get("Contents", ()):
                name = entry["Key"][skip:]
                if name and not name.endswith("/"):
                    yield StoredFile(name, entry["Size"])

    def url(self, path: str) -> str:
        """Return ``s3://<bucket>/<key>``."""
        return SCHEME + path

    def version(self, url: str) -> str | None:
        """Return what tells the object at *url* from another; None where there is none.

        Raises:
            FetchError: S3 refuses, or does not answer.
        """
        bucket, _, key = url.removeprefix(SCHEME).partition("/")
        try:
            found = self._s3_client(bucket).head_object(Bucket=bucket, Key=key)
        except Exception as error:
            if is_absent(error):
                return None
            raise translate_error(error, url) from None
        return f"{found['ContentLength']} {found.get('ETag', '')}"

    def put(self, url: str, file: Path, *, anew: bool) -> None:
        """Make *file* the object at *url*, in one step; *anew*: unless there is one by now.

        Raises:
            FetchError: S3 refuses, or does not answer.
        """
        bucket, _, key = url.removeprefix(SCHEME).partition("/")
        region = self._regions.get(bucket)
        guards = ({"IfNoneMatch": "*"}, {}) if anew else ({},)
        for guard in guards:
            # By boto3 alone, which sends a file as it reads it.
            try:
                with (
                    contextlib.closing(_connect(self._options, region)) as s3,
                    file.open("rb") as f,
                ):
                    s3.put_object(Bucket=bucket, Key=key, Body=f, **guard)
                return
            except Exception as error:
                if guard and is_held(error):
                    return
                if not (guard and is_unknown(error)):
                    raise translate_error(error, url) from None

    def _with_part_bytes(self, artifact: Artifact, info: ObjectInfo) -> ObjectInfo:
        """Return *info* with the size of the parts that an object was uploaded in.

        S3 tells it of one part at a time. It is asked, where nothing else proves the whole object,
        for the first and the last one: if all before the last are as large as the first, their sum
        is that of the object, to the byte. A version that is newer by now is of no matter, its
        ranges are refused.
        """
        if any(not checksum.parts for checksum in info.checksums):
            return info
        count = max((checksum.parts for checksum in info.checksums), default=0)
        if count < 2:
            return info
        bucket, _, key = artifact.url.removeprefix(SCHEME).partition("/")
        try:
            s3 = self._s3_client(bucket)
            first, last = (
                int(s3.head_object(Bucket=bucket, Key=key, PartNumber=number)["ContentLength"])
                for number in (1, count)
            )
        except Exception as error:  # a service without parts, or a right that is missing
            _log.debug("the parts of %s are not told: %s", artifact.source, type(error).__name__)
            return info
        if not 0 < last <= first or first * (count - 1) + last != info.size_bytes:
            return info
        known = (replace(checksum, part_bytes=first) for checksum in info.checksums)
        return replace(info, checksums=tuple(known))

    def _pages(self, path: str, **query: str) -> Iterator[dict[str, Any]]:
        bucket = path.partition("/")[0]
        try:
            pages = self._s3_client(bucket).get_paginator("list_objects_v2")
            size = {"PageSize": _PAGE_SIZE}
            query |= {"Bucket": bucket, "Prefix": _key_prefix(path)}
            for page in pages.paginate(PaginationConfig=size, **query):
                # boto3 follows a bucket to its region; a URL has to be signed for it.
                headers = page.get("ResponseMetadata", {}).get("HTTPHeaders", {})
                if region := headers.get("x-amz-bucket-region"):
                    self._regions[bucket] = region
                yield page
        except LoaderError:
            raise
        except Exception as error:
            raise translate_error(error, SCHEME + path) from None

    def _with_url(self, artifact: Artifact, ask: Callable[[str], _Out]) -> _Out:
        """Return what *ask* makes of a signed URL, of a new one where that has expired."""
        with refusals_translated(artifact.url):
            try:
                return ask(self._get_url(artifact))
            except ExpiredError:
                self._signed.pop(artifact.url, None)
            return ask(self._get_url(artifact))

    def _get_url(self, artifact: Artifact) -> str:
        url, until_s = self._signed.get(artifact.url, ("", 0.0))
        if time.monotonic() >= until_s:
            url = self._sign(artifact, "get_object", {})
            self._signed[artifact.url] = (url, time.monotonic() + _USED_S)
        return url

    def _sign(self, artifact: Artifact, operation: str, more: dict[str, str]) -> str:
        bucket, _, key = artifact.url.removeprefix(SCHEME).partition("/")
        try:
            return str(
                self._s3_client(bucket).generate_presigned_url(
                    operation,
                    Params={"Bucket": bucket, "Key": key, **more},
                    ExpiresIn=_SIGNED_S,
                )
            )
        except LoaderError:
            raise
        except Exception as error:
            raise translate_error(error, artifact.url) from None

    def _answer(self, request: Any, **_: Any) -> Any:
        """Return what is answered to a *request* of boto3's, read by the rules of every answer."""
        from botocore.awsrequest import AWSResponse

        headers = {
            name: value.decode("latin-1") if isinstance(value, bytes) else str(value)
            for name, value in request.headers.items()
            if name.lower() != "host"  # which is told once
        }

        def ask() -> tuple[int, Mapping[str, str], bytes]:
            status, fields, stream = self._client.exchange(
                request.method, request.url, headers=headers, body=request.body or None
            )
            with contextlib.closing(stream):
                return status, fields, stream.read_all(_PAGE_BYTES)

        try:
            status, fields, content = ask_again(ask, self._options.retries)
        except TransientError as error:
            raise unanswered(error) from None
        response = AWSResponse(request.url, status, dict(fields), io.BytesIO(content))
        response._content = content
        return response

    def _s3_client(self, bucket: str) -> Any:
        region = self._regions.get(bucket)
        with self._lock:
            if region not in self._s3:
                try:
                    self._s3[region] = _connect(self._options, region, self._answer)
                except Exception as error:
                    raise translate_error(error, self._options.endpoint_url or SCHEME) from None
            return self._s3[region]


def _connect(
    options: S3Options, region: str | None, answer: Callable[..., Any] | None = None
) -> Any:
    import boto3
    from botocore.config import Config

    own = options.credentials
    session = boto3.session.Session(
        aws_access_key_id=_text(own.access_key_id),
        aws_secret_access_key=_text(own.secret_access_key),
        aws_session_token=_text(own.session_token),
        region_name=own.region,
    )
    client = session.client(
        "s3",
        endpoint_url=options.endpoint_url,
        region_name=region or session.region_name or "us-east-1",
        verify=options.ca_bundle and str(options.ca_bundle),
        config=Config(
            signature_version="s3v4",
            retries={"mode": "standard", "total_max_attempts": options.retries + 1},
        ),
    )
    if answer is not None:
        client.meta.events.register_first("before-send.s3", answer)
    return client


def _text(secret: Secret | None) -> str | None:
    return secret.value if secret else None


def _key_prefix(path: str) -> str:
    key = path.partition("/")[2]
    return f"{key}/" if key else ""
