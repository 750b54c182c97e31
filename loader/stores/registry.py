"""Which store a source is: a listing's path or URL, ``s3://``, ``baseten``, or a URL for fsspec."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from loader.config.settings import Settings
from loader.errors import ConfigError, ExpiredError, FetchError, ListingError, UnreachableError
from loader.http.client import HttpClient, HttpOptions
from loader.http.objects import ObjectInfo
from loader.retry import ask_again
from loader.stores.base import ByteStream, PendingResponse, Progress, Store, count_up
from loader.stores.baseten import NAME as BASETEN
from loader.stores.baseten import Api, JobFiles
from loader.stores.fs import FsspecStore
from loader.stores.job_folders import Count, Listed, Tree, find_jobs, list_folder, list_jobs
from loader.stores.laid_files import has_ranks, is_link_to, list_ranks
from loader.stores.presigned import FileListing, PresignedStore, UrlListing
from loader.stores.s3 import SCHEME as S3
from loader.stores.s3 import S3Options, S3Store
from loader.stores.urls import ListingSource, ReadSource, SignedUrls
from loader.types import Artifact, Listing

_URL = re.compile(r"[a-z][a-z0-9+.-]*:(//|:)", re.IGNORECASE)  # fsspec chains schemes by ::
_WEB = ("http://", "https://")
LOCAL = "local"  # what lies in the download folder, without any origin


def is_remote(source: str) -> bool:
    """Return whether *source* is a URL or ``baseten``, not a path of this machine."""
    return bool(_URL.match(source)) or source == BASETEN or source.startswith(f"{BASETEN}:")


def http_options(settings: Settings) -> HttpOptions:
    """Return what holds for every connection."""
    return HttpOptions(
        connect_timeout_s=settings.connect_timeout_s,
        stall_timeout_s=settings.stall_timeout_s,
        least_bytes_per_s=settings.least_bytes_per_s,
        ca_bundle=settings.ca_bundle,
        link_local=settings.allow_local_urls,
        insecure_redirects=settings.allow_insecure_redirects,
        link_local_redirects=settings.allow_local_urls,
        openssl_reads=settings.openssl_reads,
    )


class Stores:
    """Every store that the settings make possible, as one ``Store``: the URL's scheme chooses.

    *on_renewal* is called whenever listings were read again because their URLs end. *progress* is
    told of listings as they come.
    """

    def __init__(
        self,
        settings: Settings,
        on_renewal: Callable[[], object] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._settings = settings
        self._progress = progress or Progress()
        self._on_renewal = on_renewal
        options = http_options(settings)
        self._client = HttpClient(options)
        # What the user names leads where the user likes; what a listing names does not.
        self._trusted = HttpClient(replace(options, link_local=True))
        self._read: list[ReadSource] = []
        self._signed = PresignedStore(self._client)
        self._s3 = S3Store(self._trusted, _s3_options(settings))
        self._fs = FsspecStore(settings.storage_options)

    def read_listings(
        self, source: str, jobs: Sequence[str] = (), *, loops: Collection[str] = ()
    ) -> tuple[Listing, ...]:
        """Return the listings of *jobs* at *source*, of every job there where none is named.

        *loops*: those of them that are Loops checkpoints.

        Raises:
            ConfigError: no such sort of source, no key for it, or a package is missing.
            ListingError: it cannot be read, or there is no listing.
            FetchError: the place refuses or does not answer.
        """
        with self._progress.step("listing") as tell:
            count = count_up(tell, "files")
            if source == BASETEN or source.startswith(f"{BASETEN}:"):
                return self._read_baseten(source, jobs, loops, count)
            if not is_remote(source):
                return self._keep(FileListing(Path(source), local_urls=self._local))
            if source.lower().startswith(_WEB):
                scheme, _, rest = source.partition(":")
                return self._read_url(f"{scheme.lower()}:{rest}")
            tree, root = self._tree(source)
            return self._keep(Listed(partial(list_jobs, tree, root, jobs, count)))

    def find_jobs(self, source: str) -> tuple[str, ...]:
        """Return the jobs at *source*, by as little as names them. Raises as ``read_listings``."""
        if is_remote(source) and not source.lower().startswith((*_WEB, BASETEN)):
            with self._progress.step("listing"):
                if jobs := find_jobs(*self._tree(source)):
                    return jobs
        return tuple(dict.fromkeys(one.job for one in self.read_listings(source)))

    def read_download_folder(self, folder: Path, jobs: Sequence[str]) -> tuple[Listing, ...]:
        """Return the listings of those *jobs* of which something lies in the download *folder*.

        Of a job named alone, the ranks may lie in *folder* itself, or some of its files may.

        Raises:
            DiskError: a folder cannot be read.
        """
        found = []
        within = (folder, *map(Path, self._settings.trusted_folders))
        for job in jobs:
            flat = list_ranks(folder, within, job) if len(jobs) == 1 else ()
            files = {artifact.path: artifact for artifact in flat}
            for artifact in list_ranks(folder / job, within, job):
                known = files.get(artifact.path)
                if known is None or not is_link_to(artifact, known):
                    files[artifact.path] = artifact
            if files or has_ranks(folder / job):
                found.append(Listing(job, tuple(files.values())))
        return tuple(found)

    def read_folder(self, url: str, name: str) -> Listing:
        """Return the files below *url*, a model's folder, as rank 0 of a job called *name*.

        Raises:
            ConfigError: no such sort of source, or a package is missing.
            FetchError: the place refuses or does not answer, or there is no file.
        """
        tree, root = self._tree(url)
        with self._progress.step("listing") as tell:
            count = count_up(tell, "files")
            (listing,) = self._keep(Listed(lambda: (list_folder(tree, root, name, count),)))
        if not listing.artifacts:
            raise FetchError("no files there", where=url, next_step="correct the URL")
        return listing

    def stat(self, artifact: Artifact) -> ObjectInfo:
        """Return size and version. Raises as ``Store.stat`` does."""
        return self._store(artifact).stat(artifact)

    def open_first(self, artifact: Artifact, end: int) -> ByteStream:
        """Return the bytes ``[0, end)`` of the version there is. Raises as ``Store.open_first``."""
        return self._store(artifact).open_first(artifact, end)

    def send_first(self, artifact: Artifact, end: int) -> PendingResponse:
        """Send what ``open_first`` sends. Raises as ``Store.send_first`` does."""
        return self._store(artifact).send_first(artifact, end)

    def open_range(
        self, artifact: Artifact, start: int, end: int, version: ObjectInfo
    ) -> ByteStream:
        """Return the bytes ``[start, end)`` of *version*. Raises as ``Store.open_range`` does."""
        return self._store(artifact).open_range(artifact, start, end, version)

    def listed_size(self, artifact: Artifact) -> int | None:
        """Return the size that its listing has now. Raises as ``Store.listed_size`` does."""
        return self._signed.listed_size(artifact)

    def close(self) -> None:
        """Drop every connection."""
        for store in (self._signed, self._s3, self._fs):
            store.close()

    @property
    def _local(self) -> bool:
        return self._settings.allow_local_urls

    def _store(self, artifact: Artifact) -> Store:
        if artifact.url.startswith(_WEB):
            return self._signed
        return self._s3 if artifact.url.startswith(S3) else self._fs

    def _tree(self, url: str) -> tuple[Tree, str]:
        if url.startswith(S3):
            root = url.removeprefix(S3).strip("/")
            if not root:
                raise ConfigError("s3:// without a bucket", expected="s3://<bucket>/<prefix>")
            return self._s3, root
        if "::" in url:
            raise ConfigError("chained URLs of fsspec are not supported", where=url)
        tree = self._fs.tree(url)
        return tree, tree.path(url)

    def _read_baseten(
        self, source: str, jobs: Sequence[str], loops: Collection[str], count: Count
    ) -> tuple[Listing, ...]:
        _, _, named = source.partition(":")
        wanted = (named,) if named else tuple(jobs)
        if not wanted:
            raise ConfigError(
                "which training job?",
                where=source,
                expected=f"{BASETEN}:<job id>",
                next_step="name it there, with --job-id, or in training_checkpoints",
            )
        settings = self._settings
        api = Api(self._trusted, settings.api_url, settings.api_key, settings.retries)
        sources = (JobFiles(api, job, count, loops=job in loops) for job in wanted)
        return tuple(listing for source in sources for listing in self._keep(source))

    def _read_url(self, url: str) -> tuple[Listing, ...]:
        """Read a listing behind a URL, whose failures are the listing's."""
        listing = UrlListing(url, self._trusted, local_urls=self._local)
        try:
            return ask_again(partial(self._keep, listing), self._settings.retries)
        except FetchError as error:
            kind = UnreachableError if error.retryable else ListingError
            raise kind(
                f"the listing cannot be fetched: {error.what}",
                where=url,
                got=error.got,
                next_step="get a new URL of the listing"
                if isinstance(error, ExpiredError)
                else error.next_step or "check the URL, and that this machine can reach it",
            ) from None

    def _keep(self, source: ListingSource) -> tuple[Listing, ...]:
        """Return what *source* has, and remember it: its URLs may have to be signed anew."""
        listings = source.read()
        self._read.append(ReadSource(source, listings))
        self._signed = PresignedStore(self._client, SignedUrls(self._read, self._on_renewal))
        return listings


def _s3_options(settings: Settings) -> S3Options:
    return S3Options(
        endpoint_url=settings.s3_endpoint_url,
        credentials=settings.s3,
        retries=settings.retries,
        ca_bundle=settings.ca_bundle,
    )


def open_s3(settings: Settings) -> S3Store:
    """Return what is behind ``s3://``, for a place that the user names."""
    return S3Store(
        HttpClient(replace(http_options(settings), link_local=True)), _s3_options(settings)
    )
