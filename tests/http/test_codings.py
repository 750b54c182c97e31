"""Content-Encoding of files and of documents, beside what requests and curl make of it."""

from __future__ import annotations

import gzip
import json
import zlib
from contextlib import closing
from pathlib import Path

import pytest
import requests

from loader.errors import FetchError
from loader.fetch.snapshot import FetchOptions, fetch
from loader.http.client import HttpClient, HttpOptions
from loader.http.codings import content_coding, decode
from loader.stores.presigned import PresignedStore, UrlListing
from loader.types import Artifact, Manifest
from tests.http.raw import answering

TEXT = json.dumps({"job": {"id": "j"}, "checkpoint_artifacts": []}).encode()
GZIP = gzip.compress(TEXT)


def answer(body: bytes, *codings: str) -> bytes:
    fields = "".join(f"Content-Encoding: {coding}\r\n" for coding in codings)
    return f"HTTP/1.1 200 OK\r\n{fields}Content-Length: {len(body)}\r\n\r\n".encode() + body


def bring(name: str, said: bytes, root: Path) -> bytes:
    store = PresignedStore(HttpClient(HttpOptions()))
    with answering(said) as origin, closing(store):
        file = Artifact("j", 0, name, f"{origin.url}/rank-0/{name}?Signature=s")
        snapshot = fetch(Manifest((file,)), root, store, FetchOptions())
    return (snapshot.root / snapshot.files[0].path).read_bytes()


@pytest.mark.parametrize(
    "codings", [(), ("",), ("identity",), ("aws-chunked",), ("AWS-Chunked, ",)]
)
def test_codings_that_mean_nothing(codings: tuple[str, ...], tmp_path: Path) -> None:
    assert bring("x.json", answer(TEXT, *codings), tmp_path) == TEXT


@pytest.mark.parametrize(
    "codings", [("gzip",), ("aws-chunked", "gzip"), ("br",), ("zstd",), ("new",)]
)
def test_a_coded_file_gets_no_name(codings: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=f"Content-Encoding {codings[-1]}") as caught:
        bring("config.json", answer(GZIP, *codings), tmp_path)
    assert not caught.value.retryable
    assert not [path for path in tmp_path.rglob("config.json") if path.is_file()]


@pytest.mark.parametrize(
    ("name", "coding"),
    [("a.tar.gz", "gzip"), ("a.TGZ", "x-gzip"), ("a b.json.br", "br"), ("a.zst", "zstd")],
)
def test_a_name_that_says_so_is_kept_as_it_is(name: str, coding: str, tmp_path: Path) -> None:
    assert bring(name.replace(" ", "%20"), answer(GZIP, coding), tmp_path) == GZIP


def test_a_name_of_another_coding(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="Content-Encoding gzip"):
        bring("a.zst", answer(GZIP, "gzip"), tmp_path)


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", GZIP),
        ("x-gzip", GZIP),
        ("gzip", gzip.compress(TEXT[:20]) + gzip.compress(TEXT[20:])),
        ("deflate", zlib.compress(TEXT)),
        ("aws-chunked, gzip", GZIP),
    ],
)
def test_a_listing_is_decoded(coding: str, body: bytes, client: HttpClient) -> None:
    with answering(answer(body, coding)) as origin:
        (listing,) = UrlListing(origin.url, client).read()
        assert listing.job == "j"
        if coding in ("gzip", "x-gzip", "deflate"):
            with requests.Session() as session:
                session.trust_env = False
                assert session.get(origin.url, timeout=5).content == TEXT


@pytest.mark.parametrize("body", [b"", TEXT, GZIP[:-1], GZIP[:5], GZIP + b"x"])
def test_what_is_not_of_its_coding(body: bytes, client: HttpClient) -> None:
    with answering(answer(body, "gzip")) as origin:
        listing = UrlListing(origin.url, client)
        if body:
            with pytest.raises(FetchError, match="not gzip"):
                listing.read()
    with answering(answer(GZIP, "br")) as origin:
        listing = UrlListing(origin.url, client)
        with pytest.raises(FetchError, match="Content-Encoding br"):
            listing.read()


def test_a_little_that_becomes_much() -> None:
    bomb = gzip.compress(bytes(50 << 20))
    with pytest.raises(FetchError, match="too long"):
        decode(bomb * 3, "gzip", 1 << 20, "u")


def test_what_is_said_twice() -> None:
    assert content_coding({"content-encoding": "gzip, GZIP"}) == "gzip, gzip"
    with pytest.raises(FetchError):
        decode(GZIP, "gzip, gzip", 1 << 20, "u")
