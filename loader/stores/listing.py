"""The listing JSON of ``truss train get_checkpoint_urls``, as text: every entry is checked.

    {"timestamp": …, "job": {"id": …, …}, "checkpoint_artifacts": [
        {"url": …, "relative_file_name": …, "node_rank": 0, "size_bytes": 12 (optional)}, …]}

A page of the REST API (``presigned_urls``, ``total_count``, ``next_page_token``) is read as well,
where a ``job`` was put beside it. One file may hold a list of such objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypeGuard

from loader.errors import ListingError
from loader.types import JOB_ID, Artifact, Listing

_LISTS = ("checkpoint_artifacts", "presigned_urls")
_SHOWN = 20


def parse_listings(text: bytes, where: str) -> tuple[Listing, ...]:
    """Return the listings that *text* holds; *where* is for messages.

    Raises:
        ListingError: not JSON, no job, or entries that are wrong, all of them named.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ListingError(
            "the listing is not JSON",
            where=where,
            got=getattr(error, "msg", None) or type(error).__name__,
            next_step="give the file that `truss train get_checkpoint_urls` wrote",
        ) from None
    documents = document if isinstance(document, list) else [document]
    return tuple(_parse(entry, where) for entry in documents)


def _parse(document: object, where: str) -> Listing:
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
    artifacts = []
    for i, entry in enumerate(entries):
        artifact = _artifact(job_id, entry)
        if isinstance(artifact, str):
            problems.append(f"checkpoint_artifacts[{i}]: {artifact}")
        else:
            artifacts.append(artifact)
    total = fields.get("total_count")
    if total is not None and not _is_count(total):
        problems.append("total_count: expected a number that is not negative")
    elif total is None and fields.get("next_page_token") is not None:
        problems.append("next_page_token: this is one page; further pages are missing")
    if problems:
        more = len(problems) - _SHOWN
        raise ListingError(
            f"the listing has {len(problems)} wrong entries",
            where=where,
            problems=problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else []),
            next_step="get the listing again",
        )
    return Listing(job_id, tuple(artifacts), total)


def _artifact(job: str, entry: object) -> Artifact | str:
    """Return the artifact, or what is wrong with *entry*."""
    if not isinstance(entry, Mapping):
        return "expected an object"
    url, name = entry.get("url"), entry.get("relative_file_name")
    rank, size = entry.get("node_rank"), entry.get("size_bytes")
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        return "url: expected an http(s) URL"
    if not isinstance(name, str) or not name:
        return "relative_file_name: expected a name"
    if not name.isascii() and not _is_unicode(name):
        return f"relative_file_name: not valid Unicode: {name!a}"
    if not _is_count(rank):
        return f"node_rank: expected a number that is not negative, got {rank!r}"
    if size is not None and not _is_count(size):
        return f"size_bytes: expected a number that is not negative, got {size!r}"
    return Artifact(job, rank, name, url, size)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_unicode(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _shape(document: object) -> str:
    if isinstance(document, Mapping):
        return "an object with " + (", ".join(map(repr, list(document)[:8])) or "no keys")
    return type(document).__name__
