"""Artifacts behind signed http(s) URLs, and the listings that name them."""

from __future__ import annotations

from pathlib import Path

from loader.errors import ExpiredError, FetchError, ListingError
from loader.stores.base import ObjectInfo
from loader.stores.http import HttpClient, HttpStream
from loader.stores.listing import parse_listings
from loader.types import Artifact, Listing

_LISTING_LIMIT_BYTES = 1 << 30


class PresignedStore:
    """A ``Store`` of artifacts that each carry their URL. Never sends HEAD, which is refused."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def stat(self, artifact: Artifact) -> ObjectInfo:
        """Return size and version, by asking for the first byte."""
        stream = self._client.get(artifact.url, span=(0, 1))
        try:
            if stream.info.ranges:
                stream.readinto(memoryview(bytearray(1)))
            return stream.info
        finally:
            stream.close()

    def open_range(
        self, artifact: Artifact, start: int, end: int, version: ObjectInfo
    ) -> HttpStream:
        """Return the bytes ``[start, end)`` of *version*."""
        span = (start, end) if version.ranges else None
        if span is None and start:
            raise FetchError(
                "the origin does not honour ranges, so the file must be read from its start",
                where=artifact.source,
            )
        stream = self._client.get(artifact.url, span=span, version=version)
        if span is not None and not stream.info.ranges and (start, end) != (0, version.size_bytes):
            stream.close()
            raise FetchError("the origin stopped honouring ranges", where=artifact.source)
        return stream

    def close(self) -> None:
        """Drop every connection."""
        self._client.close()


def read_listings(source: str, client: HttpClient) -> tuple[Listing, ...]:
    """Return the listings at *source*, a path or an http(s) URL.

    Raises:
        ListingError: it cannot be read, or is no listing.
    """
    if source.startswith(("http://", "https://")):
        try:
            stream = client.get(source)
            try:
                text = stream.read_all(_LISTING_LIMIT_BYTES)
            finally:
                stream.close()
        except FetchError as error:
            raise ListingError(
                f"the listing cannot be fetched: {error.what}",
                where=source,
                got=error.got,
                next_step="get a new URL of the listing"
                if isinstance(error, ExpiredError)
                else error.next_step or "check the URL, and that this machine can reach it",
            ) from None
    else:
        try:
            text = Path(source).read_bytes()
        except OSError as error:
            raise ListingError(
                "the listing cannot be read",
                where=source,
                expected="a file that `truss train get_checkpoint_urls` wrote, or its URL",
                got=error.strerror or type(error).__name__,
                next_step="correct --artifacts or the setting artifacts",
            ) from None
    return parse_listings(text, source)
