"""The training platform's REST API: job id -> project -> pages of signed URLs.

::

    POST v1/training_jobs/search                                      {"job_id": …}
    GET  v1/training_projects/<project>/jobs/<job>/checkpoint_files   ?page_size=&page_token=
    GET  v1/training_projects/<project>/jobs/<job>/checkpoints        which are still being copied
    GET  v1/loops/checkpoints/<id>/files                              the same pages

A page is ``{"presigned_urls": […], "total_count": …, "next_page_token": offset or null}``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from urllib.parse import quote, urlencode

from loader.config.credentials import Secret
from loader.errors import ConfigError, DeniedError, FetchError, ListingError
from loader.http.body import HttpStream
from loader.http.client import HttpClient
from loader.json_text import parse_json
from loader.retry import ask_again
from loader.stores.job_folders import Count, say_nothing
from loader.stores.listing import parse_entries
from loader.types import Artifact, Listing

NAME = "baseten"
_PAGE_SIZE = 1000
_PAGE_LIMIT_BYTES = 64 << 20
_TRIES = 3  # of listing a job whose files go away meanwhile
_log = logging.getLogger("podloader")


class Api:
    """The API as one key sees it. Safe to use from many threads."""

    def __init__(self, client: HttpClient, url: str, key: Secret | None, retries: int) -> None:
        self._client = client
        self._url = url.rstrip("/")
        self._retries = retries
        if key is None:
            raise ConfigError(
                "no key for the REST API",
                where=self._url,
                expected="Truss's secret baseten_api_key, or BASETEN_API_KEY",
                next_step="give one that may read the training job",
            )
        self._headers = {"Authorization": f"Api-Key {key.value}"}

    def get(self, path: str, **query: object) -> Mapping[str, Any]:
        """Return the JSON object that the API gives at *path*.

        Raises:
            DeniedError: it does not take the key.
            FetchError: it refuses, or does not answer after every retry.
            ListingError: it answers something else than a JSON object.
        """
        url = f"{self._url}/{path}" + (f"?{urlencode(query)}" if query else "")
        return self._ask(path, lambda: self._client.get(url, headers=self._headers))

    def post(self, path: str, body: Mapping[str, object]) -> Mapping[str, Any]:
        """Return the JSON object that the API answers to *body*. Raises as ``get`` does."""
        headers = self._headers | {"Content-Type": "application/json"}
        data = json.dumps(body).encode()
        url = f"{self._url}/{path}"
        return self._ask(path, lambda: self._client.post(url, data, headers=headers))

    def _ask(self, path: str, send: Callable[[], HttpStream]) -> Mapping[str, Any]:
        where = f"{self._url}/{path}"
        try:
            text = ask_again(partial(_read, send), self._retries)
        except DeniedError as error:
            raise DeniedError(
                "the REST API does not take the key",
                where=where,
                got=error.got,
                next_step="check the secret baseten_api_key or BASETEN_API_KEY, and its rights",
            ) from None
        try:
            document = parse_json(text)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise ListingError("the REST API answers no JSON object", where=where)
        return document


class JobFiles:
    """The files of one training job, or of one Loops checkpoint: a source that signs anew."""

    def __init__(
        self, api: Api, job: str, count: Count = say_nothing, *, loops: bool = False
    ) -> None:
        self._api = api
        self._count = count
        self._job = job
        self._loops = loops
        self._folder = ""

    def read(self) -> tuple[Listing, ...]:
        """Return the job's listing, every page of it.

        Raises:
            DeniedError: the API does not take the key.
            FetchError: the API does not answer.
            ListingError: there is no such job, or the pages do not make a whole.
        """
        if self._loops:
            files = f"v1/loops/checkpoints/{quote(self._job, safe='')}/files"
            return (self._pages(files, ()),)
        if not self._folder:
            self._folder = self._find()
        syncing = self._syncing()
        return (self._pages(f"{self._folder}/checkpoint_files", syncing),)

    def has_news(self) -> bool:
        """Return True: URLs are signed anew each time."""
        return True

    def _find(self) -> str:
        """Return the path of the job's project and the job."""
        found = self._api.post("v1/training_jobs/search", {"job_id": self._job})
        jobs = found.get("training_jobs")
        for job in jobs if isinstance(jobs, list) else ():
            fields = job if isinstance(job, dict) else {}
            project = fields.get("training_project")
            name = project.get("id") if isinstance(project, dict) else None
            if fields.get("id") == self._job and isinstance(name, str):
                parts = (quote(part, safe="") for part in (name, self._job))
                return "v1/training_projects/{}/jobs/{}".format(*parts)
        raise ListingError(
            "no such training job",
            where=NAME,
            expected=self._job,
            next_step="correct training_job_id, or give a key of the job's workspace",
        )

    def _syncing(self) -> tuple[str, ...]:
        """Return the checkpoints that are still being copied; none where the API does not say."""
        try:
            checkpoints = self._api.get(f"{self._folder}/checkpoints").get("checkpoints")
        except (FetchError, ListingError) as error:
            if isinstance(error, DeniedError):
                raise
            _log.warning("it is not known whether the job's checkpoints are whole: %s", error.what)
            return ()
        return tuple(
            str(entry.get("checkpoint_id"))
            for entry in (checkpoints if isinstance(checkpoints, list) else ())
            if isinstance(entry, dict) and entry.get("sync_status") not in (None, "COMPLETE")
        )

    def _pages(self, path: str, syncing: tuple[str, ...]) -> Listing:
        for _ in range(_TRIES):
            files, total = self._read_pages(path)
            if files is not None:
                return Listing(self._job, tuple(files.values()), total, syncing)
            _log.info("files of %s were removed while they were listed: once more", self._job)
        raise ListingError(
            "files of the job are removed while they are listed",
            where=path,
            expected="as many files on the last page as were counted on the first",
            next_step="run again when the job does not change any more",
        )

    def _read_pages(self, path: str) -> tuple[dict[str, Artifact] | None, int | None]:
        """Return the files by their paths, and how many there are; no files where some went away.

        A token is an offset: what stands behind a file that is removed moves to a page that was
        read before. A file that is added lets others come twice, which is no harm.
        """
        files: dict[str, Artifact] = {}
        token = most = 0
        while True:
            query = {"page_size": _PAGE_SIZE} | ({"page_token": token} if token else {})
            page = self._api.get(path, **query)
            entries = page.get("presigned_urls")
            following, total = page.get("next_page_token"), page.get("total_count")
            if not isinstance(entries, list) or not isinstance(total, int | None):
                raise ListingError("not a page of files", where=path, expected="presigned_urls")
            if total is not None and total < most:
                return None, total
            most = total or 0
            known = len(files)
            files.update((a.path, a) for a in parse_entries(self._job, entries, path))
            self._count(len(files) - known)
            if following is None:
                return files, total
            if not isinstance(following, int) or following <= token or len(files) == known:
                raise ListingError(
                    "the pages of files go round in a circle",
                    where=path,
                    expected=f"other files, and a next_page_token above {token}",
                    got=f"{len(files) - known} other files, next_page_token {following!r}",
                )
            token = following


def _read(send: Callable[[], HttpStream]) -> bytes:
    stream = send()
    try:
        return stream.read_all(_PAGE_LIMIT_BYTES)
    finally:
        stream.close()
