"""The listing JSON of ``truss train get_checkpoint_urls``, as text: every entry is checked.

    {"timestamp": …, "job": {"id": …, …}, "checkpoint_artifacts": [
        {"url": …, "relative_file_name": …, "node_rank": 0, "size_bytes": 12 (optional)}, …]}

A page of the REST API (``presigned_urls``, ``total_count``, ``next_page_token``) is read as well,
where a ``job`` was put beside it. One file may hold a list of such objects.

URLs lead to where the listing's author likes: only http(s), and never to the machine's own link or
its files, unless the settings allow it.
"""

from __future__ import annotations

import functools
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import TypeGuard
from urllib.parse import urlsplit

from loader.errors import ListingError
from loader.http.addresses import is_link_local
from loader.json_text import parse_json
from loader.types import JOB_ID, Artifact, Listing

_LISTS = ("checkpoint_artifacts", "presigned_urls")
_SHOWN = 20
_AUTHORITY = re.compile(r"https?://[^/?#]*")


def parse_listings(text: bytes, where: str, *, local_urls: bool = False) -> tuple[Listing, ...]:
    """Return the listings that *text* holds; *where* is for messages.

    ``local_urls``: whether they may lead to ``file://`` and the machine's own link.

    Raises:
        ListingError: not JSON, no job, or entries that are wrong, all of them named.
    """
    try:
        document = parse_json(text)
    except ValueError as error:
        raise ListingError(
            "the listing is not JSON",
            where=where,
            got=getattr(error, "msg", None) or type(error).__name__,
            next_step="give the file that `truss train get_checkpoint_urls` wrote",
        ) from None
    documents = document if isinstance(document, list) and document else [document]
    return tuple(_parse(entry, where, local_urls) for entry in documents)


def _parse(document: object, where: str, local_urls: bool) -> Listing:
    fields = document if isinstance(document, Mapping) else {}
    job = fields.get("job")
    job_id = job.get("id") if isinstance(job, Mapping) else fields.get("training_job_id")
    entries = next((fields[name] for name in _LISTS if name in fields), None)
    if not isinstance(job_id, str) or not isinstance(entries, list):
        raise ListingError(
            "not an artifact listing",
            where=where,
            expected="an object with job.id and a list checkpoint_artifacts",
            got=_shape(document),
            next_step="give the file that `truss train get_checkpoint_urls` wrote",
        )
    problems: list[str] = []
    if not JOB_ID.fullmatch(job_id):
        problems.append(f"job.id: expected a plain id, got {job_id!r}")
    artifacts = _artifacts(job_id, entries, local_urls, problems)
    total = fields.get("total_count")
    if total is not None and not _is_count(total):
        problems.append("total_count: expected a number that is not negative")
    elif total is None and fields.get("next_page_token") is not None:
        problems.append("next_page_token: this is one page; further pages are missing")
    _refuse(problems, where)
    return Listing(job_id, artifacts, total)


def parse_entries(
    job: str, entries: Sequence[object], where: str, *, local_urls: bool = False
) -> tuple[Artifact, ...]:
    """Return the artifacts of *job* that *entries* name.

    Raises:
        ListingError: entries that are wrong, all of them named.
    """
    problems: list[str] = []
    artifacts = _artifacts(job, entries, local_urls, problems)
    _refuse(problems, where)
    return artifacts


def _refuse(problems: Sequence[str], where: str) -> None:
    if problems:
        more = len(problems) - _SHOWN
        raise ListingError(
            f"the listing has {len(problems)} wrong entr{'y' if len(problems) == 1 else 'ies'}",
            where=where,
            problems=[*problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])],
            next_step="get the listing again",
        )


def _artifacts(
    job: str, entries: Sequence[object], local_urls: bool, problems: list[str]
) -> tuple[Artifact, ...]:
    artifacts = []
    for i, entry in enumerate(entries):
        artifact = _artifact(job, entry, local_urls)
        if isinstance(artifact, str):
            problems.append(f"checkpoint_artifacts[{i}]: {artifact}")
        else:
            artifacts.append(artifact)
    return tuple(artifacts)


def _artifact(job: str, entry: object, local_urls: bool) -> Artifact | str:
    """Return the artifact, or what is wrong with *entry*."""
    if not isinstance(entry, Mapping):
        return "expected an object"
    url, name = entry.get("url"), entry.get("relative_file_name")
    rank, size = entry.get("node_rank"), entry.get("size_bytes")
    wrong = _url_problem(url, local_urls) if isinstance(url, str) else "expected an http(s) URL"
    if wrong or not isinstance(url, str):
        return f"url: {wrong}"
    if not isinstance(name, str) or not name:
        return "relative_file_name: expected a name"
    if not name.isascii() and not _is_unicode(name):
        return f"relative_file_name: not valid Unicode: {name!a}"
    if not _is_count(rank):
        return f"node_rank: expected a number that is not negative, got {reprlib.repr(rank)}"
    if size is not None and not _is_count(size):
        return f"size_bytes: expected a number that is not negative, got {reprlib.repr(size)}"
    return Artifact(job, rank, name, url, size)


def _url_problem(url: str, local_urls: bool) -> str:
    if url.startswith("file://"):
        return "" if local_urls else "a file of this machine; allow_local_urls would allow it"
    match = _AUTHORITY.match(url)
    if match is None:
        return "expected an http(s) URL"
    return "" if local_urls else _host_problem(match[0])


@functools.lru_cache  # a listing has a million URLs and few hosts
def _host_problem(authority: str) -> str:
    try:
        host = urlsplit(authority).hostname or ""
    except ValueError:
        return "expected an http(s) URL"
    if is_link_local(host):
        return f"{host} is of this machine's own link; allow_local_urls would allow it"
    return ""


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 63  # what a file system counts with


def _is_unicode(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _shape(document: object) -> str:
    if isinstance(document, Mapping):
        return "an object with " + (", ".join(map(repr, list(document)[:8])) or "no keys")
    return type(document).__name__
