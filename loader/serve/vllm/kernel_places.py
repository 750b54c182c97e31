"""Where archives of compiled kernels lie: a folder that pods share, or a place in S3."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from loader.config.values import user_path
from loader.errors import ConfigError, redact

if TYPE_CHECKING:
    from loader.config.settings import Settings

_S3 = "s3://"
_SCHEME_END = "://"
_RETRIES = 2  # a start waits for it


class KernelPlace(Protocol):
    """Archives by name."""

    def version(self, name: str) -> str | None:
        """Return what tells the archive that is there now from another; None without one.

        Raises:
            LoaderError: the place does not say.
            OSError: the disk refuses.
        """

    def get(self, name: str, scratch: Path, stop: threading.Event) -> Path:
        """Return the archive as a file, which may be in *scratch*. *stop* ends that.

        Raises:
            LoaderError: it cannot be brought here.
            OSError: the disk refuses.
        """

    def put(self, name: str, file: Path, *, anew: bool) -> None:
        """Make *file* the archive, in one step; *anew*: unless there is one by now.

        Raises:
            LoaderError: the place refuses.
            OSError: the disk refuses.
        """


def open_place(settings: Settings, location: str) -> KernelPlace:
    """Return what is behind *location*, the setting.

    Raises:
        ConfigError: it is neither a folder nor a place in S3, or one that training jobs write.
    """
    if location.startswith(_S3):
        _refuse_jobs(location, [s for s in _sources(settings) if s.startswith(_S3)])
        return _S3Place(settings, location.rstrip("/"))
    if _SCHEME_END in location or not location:
        raise ConfigError(
            "kernel_cache is no folder, and not in S3",
            where="kernel_cache",
            expected="a folder's path, or s3://<bucket>/<prefix>",
            got=redact(location),
        )
    folder = user_path(location).absolute()
    downloads = settings.training.download_folder.absolute()
    local = [s for s in _sources(settings) if _SCHEME_END not in s]
    within = [str(user_path(source).absolute()) for source in (*local, str(downloads))]
    _refuse_jobs(str(folder), within)
    _refuse_jobs(str(folder.resolve()), [str(Path(place).resolve()) for place in within])
    return _FolderPlace(folder)


def _sources(settings: Settings) -> list[str]:
    return [*settings.artifacts, *filter(None, [settings.base_model])]


def _refuse_jobs(location: str, places: list[str]) -> None:
    """Raise where *location* is in one of *places*, from where models come: kernels are code."""
    for place in places:
        if f"{location}/".startswith(f"{place.rstrip('/')}/"):
            raise ConfigError(
                "kernel_cache lies where models come from",
                where="kernel_cache",
                expected="a place of its own, that no training job may write to: what is in it is "
                "run by vLLM as code",
                got=f"{redact(location)} in {redact(place)}",
                next_step="name another bucket, prefix or folder",
            )


class _FolderPlace:
    """Files of a folder; one is published by a rename."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def version(self, name: str) -> str | None:
        try:
            found = (self._folder / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"

    def get(self, name: str, scratch: Path, stop: threading.Event) -> Path:
        return self._folder / name

    def put(self, name: str, file: Path, *, anew: bool) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if anew and self.version(name) is not None:
            return
        descriptor, fresh = tempfile.mkstemp(".partial", f".{name}.", self._folder)
        try:
            with os.fdopen(descriptor, "wb") as out, file.open("rb") as source:
                shutil.copyfileobj(source, out)
                out.flush()
                os.fchmod(out.fileno(), 0o644)
                os.fsync(out.fileno())
            Path(fresh).replace(self._folder / name)
        except BaseException:
            Path(fresh).unlink(missing_ok=True)
            raise


class _S3Place:
    """Objects below a prefix; one is published by one request."""

    def __init__(self, settings: Settings, url: str) -> None:
        from loader.stores.registry import open_s3

        self._settings = replace(settings, retries=min(settings.retries, _RETRIES))
        self._url = url
        self._store = open_s3(self._settings)

    def version(self, name: str) -> str | None:
        return self._store.version(f"{self._url}/{name}")

    def get(self, name: str, scratch: Path, stop: threading.Event) -> Path:
        from loader.fetch.arrivals import Arrivals
        from loader.fetch.progress import Progress
        from loader.fetch.snapshot import FetchOptions, fetch
        from loader.types import Artifact, Manifest

        artifact = Artifact("kernels", 0, name, f"{self._url}/{name}")
        arrivals = Arrivals(scratch, [artifact.path])
        arrivals.stop = stop
        options = FetchOptions.of(self._settings)
        fetch(Manifest((artifact,)), scratch, self._store, options, Progress(), arrivals)
        return scratch / artifact.path

    def put(self, name: str, file: Path, *, anew: bool) -> None:
        self._store.put(f"{self._url}/{name}", file, anew=anew)
