"""What an object's bytes were coded as when they were stored: ``Content-Encoding``.

Sizes, validators and sums are of the coded bytes, and so are ranges. So a file's bytes are taken
coded where its name says that they are, and refused else; a document is decoded.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from loader.errors import FetchError

_NOTHING = {"", "identity", "aws-chunked"}  # gateways replay the last, of the upload, over a file
_SUFFIXES = {
    "gzip": (".gz", ".gzip", ".tgz"),
    "x-gzip": (".gz", ".gzip", ".tgz"),
    "br": (".br",),
    "zstd": (".zst", ".zstd", ".tzst"),
    "compress": (".z",),
    "x-compress": (".z",),
    "deflate": (".zz", ".deflate"),
}
_WINDOW = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's numbers for both formats


def content_coding(fields: Mapping[str, str]) -> str:
    """Return the codings that mean something, "" where there are none."""
    if "content-encoding" not in fields:
        return ""
    said = (part.strip(" \t").lower() for part in fields["content-encoding"].split(","))
    return ", ".join(part for part in said if part not in _NOTHING)


def check_name(url: str, coding: str) -> None:
    """Raise FetchError where the name that *url* ends in does not say that its bytes are coded."""
    suffix = PurePosixPath(unquote(urlsplit(url).path)).suffix.lower()
    if coding and suffix not in _SUFFIXES.get(coding, ()):
        raise FetchError(
            f"the object's bytes are coded: Content-Encoding {coding}",
            where=url,
            expected="the file itself",
            next_step="store it without the coding, or turn it off at the server",
        )


def decode(body: bytes, coding: str, limit_bytes: int, url: str) -> bytes:
    """Return what *body* was before it was coded.

    Raises:
        FetchError: the coding is not known, *body* is not of it, or longer than *limit_bytes*.
    """
    if not coding:
        return body
    if coding not in _WINDOW:
        raise FetchError(f"an answer in Content-Encoding {coding}", where=url, expected="gzip")
    found = bytearray()
    try:
        while body and len(found) <= limit_bytes:
            member = zlib.decompressobj(_WINDOW[coding])
            found += member.decompress(body, limit_bytes + 1 - len(found))
            if not member.eof and len(found) <= limit_bytes:
                raise zlib.error("it ends too early")
            body = member.unused_data
    except zlib.error as error:
        raise FetchError(f"an answer that is not {coding}", where=url, got=str(error)) from None
    if len(found) > limit_bytes:
        raise too_long(url, limit_bytes)
    return bytes(found)


def too_long(url: str, limit_bytes: int) -> FetchError:
    """Return the error for an answer of more than *limit_bytes*."""
    return FetchError("the answer is too long", where=url, expected=f"at most {limit_bytes} bytes")
