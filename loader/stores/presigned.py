"""Artifacts behind signed http(s) URLs, and the listing files that name them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from loader.config.paths import suggest_path, tell_names
from loader.errors import DeniedError, ExpiredError, FetchError, ListingError, LoaderError
from loader.http.body import HttpStream
from loader.http.client import HttpClient
from loader.http.objects import ObjectInfo
from loader.stores.base import PendingResponse
from loader.stores.listing import parse_listings
from loader.stores.urls import SignedUrls
from loader.types import Artifact, Listing

_LISTING_LIMIT_BYTES = 1 << 30
_MODEL_FILES = ("config.json", "adapter_config.json")  # one of which a checkpoint has
_Out = TypeVar("_Out")


class PresignedStore:
    """A ``Store`` of artifacts that each carry their URL. Never sends HEAD, which is refused.

    A URL that the origin honours no longer is renewed by *urls*, and the request asked again.
    """

    def __init__(self, client: HttpClient, urls: SignedUrls | None = None) -> None:
        self._client = client
        self._urls = urls or SignedUrls()

    def stat(self, artifact: Artifact) -> ObjectInfo:
        """Return size and version, by asking for the first byte."""
        return self._with_url(
            artifact, lambda url: first_byte(self._client, url, artifact.size_bytes)
        )

    def open_first(self, artifact: Artifact, end: int) -> HttpStream:
        """Return the bytes ``[0, end)`` of the version there is now."""
        return self._with_url(artifact, partial(self._get_first, artifact, end))

    def send_first(self, artifact: Artifact, end: int) -> PendingResponse:
        """Ask for the bytes ``[0, end)`` of the version there is now."""
        url, span = self._urls.current(artifact), (0, end)
        sent = self._client.send(url, span=span)

        def receive() -> HttpStream:
            return self._client.receive(sent, url, span=span, size_bytes=artifact.size_bytes)

        again = partial(self._get_first, artifact, end)
        renewing = partial(self._or_renewed, artifact, url, receive, again)
        return PendingResponse(renewing, sent.abort, sent.close)

    def open_range(
        self, artifact: Artifact, start: int, end: int, version: ObjectInfo
    ) -> HttpStream:
        """Return the bytes ``[start, end)`` of *version*."""
        return self._with_url(
            artifact, lambda url: open_url(self._client, url, start, end, version)
        )

    def listed_size(self, artifact: Artifact) -> int | None:
        """Return the size that its listing has now. Raises as ``Store.listed_size`` does."""
        return self._urls.listed_size(artifact)

    def close(self) -> None:
        """Drop every connection."""
        self._client.close()

    def _get_first(self, artifact: Artifact, end: int, url: str) -> HttpStream:
        return self._client.get(url, span=(0, end), size_bytes=artifact.size_bytes)

    def _with_url(self, artifact: Artifact, ask: Callable[[str], _Out]) -> _Out:
        url = self._urls.current(artifact)
        return self._or_renewed(artifact, url, partial(ask, url), ask)

    def _or_renewed(
        self,
        artifact: Artifact,
        url: str,
        ask: Callable[[], _Out],
        again: Callable[[str], _Out],
    ) -> _Out:
        """Return what *ask* does, or *again* with a newer URL where *url* is refused."""
        try:
            return ask()
        except (ExpiredError, DeniedError) as error:
            newer = self._renewed(artifact, url, error)
        return again(newer)

    def _renewed(self, artifact: Artifact, refused: str, error: FetchError) -> str:
        try:
            newer = self._urls.renewed(artifact, refused)
        except LoaderError as reason:
            if reason.retryable:
                raise
            error.problems += (f"reading the listing again failed: {reason.what}",)
            raise error from None
        if newer is None:
            raise error
        return newer


def first_byte(client: HttpClient, url: str, size_bytes: int | None = None) -> ObjectInfo:
    """Return what the object at *url* is, by asking for its first byte.

    *size_bytes* is what a listing says, for origins that do not tell.
    """
    stream = client.get(url, span=(0, 1), size_bytes=size_bytes)
    try:
        if stream.info.ranges:
            stream.readinto(memoryview(bytearray(1)))
        return stream.info
    finally:
        stream.close()


def open_url(client: HttpClient, url: str, start: int, end: int, version: ObjectInfo) -> HttpStream:
    """Return the bytes ``[start, end)`` of *version* of the object at *url*."""
    span = (start, end) if version.ranges else None
    if span is None and start:
        raise FetchError(
            "the origin does not honour ranges, so the file must be read from its start", where=url
        )
    stream = client.get(url, span=span, version=version, is_object=True)
    whole = (start, end) == (0, version.size_bytes)
    if version.ranges and not stream.info.ranges and not whole:
        stream.close()
        raise FetchError("the origin stopped honouring ranges", where=url)
    return stream


class UrlListing:
    """The listings behind an http(s) URL."""

    def __init__(self, url: str, client: HttpClient, *, local_urls: bool = False) -> None:
        self._url = url
        self._client = client
        self._local_urls = local_urls

    def read(self) -> tuple[Listing, ...]:
        """Return the listings.

        Raises:
            FetchError: the URL is refused, or does not answer.
            ListingError: what it answers is no listing.
        """
        stream = self._client.get(self._url)
        try:
            text = stream.read_all(_LISTING_LIMIT_BYTES)
        finally:
            stream.close()
        return parse_listings(text, self._url, local_urls=self._local_urls)

    def has_news(self) -> bool:
        """Return True: what answers may sign anew each time."""
        return True


class FileListing:
    """The listings in a file of this machine, which may be replaced by newer ones."""

    def __init__(self, path: Path, *, local_urls: bool = False) -> None:
        self._given, self._path = path, path.absolute()
        self._local_urls = local_urls
        self._read: tuple[int, int, int] | None = None

    def read(self) -> tuple[Listing, ...]:
        """Return the listings.

        Raises:
            ListingError: the file cannot be read, or is no listing.
        """
        try:
            stamp = self._stamp()
            with self._path.open("rb") as file:
                text = file.read(_LISTING_LIMIT_BYTES + 1)  # a device has no end
            if len(text) > _LISTING_LIMIT_BYTES:
                raise OSError(errno.EFBIG, "more than any listing has")
        except OSError as error:
            raise ListingError(
                "the listing cannot be read",
                where=str(self._path),
                expected="a file that `truss train get_checkpoint_urls` wrote, or its URL, or a "
                "folder that holds a Truss's config.yaml",
                got=f"a folder of {tell_names(self._path) or 'nothing'}"
                if self._path.is_dir()
                else error.strerror or type(error).__name__,
                next_step=self._name_folder()
                if self._path.is_dir()
                else suggest_path(self._given, "give the path of a file, or a URL such as s3://…"),
            ) from None
        listings = parse_listings(text, str(self._path), local_urls=self._local_urls)
        self._read = stamp
        return listings

    def _name_folder(self) -> str:
        """Return what to do with a folder in a listing's place."""
        url = f"file://{self._path}"
        if any((self._path / name).is_file() for name in _MODEL_FILES):
            return (
                "what lies here needs no fetching: `podloader inspect` says what it is, merge and "
                f"`vllm serve` take its path; as a URL it is copied like a checkpoint: {url}"
            )
        return f"give a folder of jobs or ranks, or a model's, as a URL: {url}"

    def has_news(self) -> bool:
        """Return whether the file is another one than was read."""
        try:
            return self._stamp() != self._read
        except OSError:
            return False

    def _stamp(self) -> tuple[int, int, int]:
        found = self._path.stat()
        return found.st_mtime_ns, found.st_size, found.st_ino
