"""What huggingface-hub raises -> podloader's errors, by the table of faults of any origin."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path

from loader.errors import (
    ConfigError,
    DeniedError,
    DiskError,
    FetchError,
    LoaderError,
    TransientError,
)
from loader.http.statuses import retry_after_s

_BUSY, _DENIED = (429, 503), 401
_PASSING = (408, 425, *_BUSY)
_NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL)
_LEAST_BYTES = 16 << 20  # with fewer left, a disk is full for any model


def is_offline() -> bool:
    """Return whether huggingface-hub was told to ask nobody."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def not_here(where: str) -> FetchError:
    """Return what to raise where the Hub is not to be reached and the cache lacks the model."""
    other = "bring the model into HF_HOME, or set base_model to a local folder"
    return FetchError(
        "the base model is not in the cache and the Hub is not to be reached",
        where=where,
        next_step=f"unset HF_HUB_OFFLINE, {other}" if is_offline() else other,
    )


def leaves_the_cache(error: LoaderError) -> bool:
    """Return whether *error* says nothing of the model, so that what the cache holds may serve."""
    is_offlines = is_offline() and isinstance(error, FetchError)
    return isinstance(error, TransientError | DeniedError) or (
        is_offlines and not isinstance(error, DiskError)
    )


def translate_error(error: Exception, repo_id: str, revision: str | None) -> Exception:
    """Return what to raise for an *error* of huggingface-hub; itself where it is none of them."""
    from huggingface_hub import errors

    where = f"{repo_id}@{revision}" if revision else repo_id
    if isinstance(error, LoaderError):
        return error
    if isinstance(error, errors.GatedRepoError):
        return ConfigError(
            "the base model is gated",
            where=where,
            next_step="accept its licence on the Hub and give hf_access_token or HF_TOKEN",
        )
    no_hub = errors.FileMetadataError
    if isinstance(error, no_hub) or isinstance(error.__cause__, no_hub):
        return FetchError(
            "what answers is not the Hub: it does not say which version a file is of",
            where=where,
            next_step="correct HF_ENDPOINT, or the proxy that is before the Hub",
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        # What a file's own request failed with lies below: huggingface-hub looks into its cache.
        cause = error.__cause__
        if isinstance(cause, Exception) and _is_network(cause):
            return translate_error(cause, repo_id, revision)
        return not_here(where)
    status = _status(error)
    if status == _DENIED:
        return DeniedError(
            "no such base model on the Hub, or it is private, or the token is no longer honoured",
            where=where,
            got="HTTP 401",
            next_step="correct base_model, or give a token that is valid: hf_access_token or "
            "HF_TOKEN",
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return ConfigError(
            "no such base model on the Hub, or it is private",
            where=where,
            next_step="correct base_model, give a local folder, or set hf_access_token",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(
            "no such revision of the base model", where=where, next_step="correct base_revision"
        )
    if isinstance(error, errors.HfHubHTTPError) and status is not None:
        return _of_status(error, status, where)
    if isinstance(error, ValueError):
        return FetchError(
            "what the Hub says makes no sense to its client",
            where=where,
            got=str(error),
            next_step="correct HF_ENDPOINT, or the proxy that is before the Hub",
        )
    return disk_error(error) or _network_error(error, where)


def disk_error(error: Exception) -> DiskError | None:
    """Return what to raise where the system refused a file; huggingface-hub passes that on."""
    from huggingface_hub import constants, errors

    cache = str(constants.HF_HUB_CACHE)
    network = ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError
    is_network = isinstance(error, network) or getattr(error, "errno", None) in _NO_WAY
    is_own = isinstance(error, errors.HfHubHTTPError | errors.LocalEntryNotFoundError)
    if isinstance(error, OSError) and error.errno is not None and not (is_network or is_own):
        path = error.filename if isinstance(error.filename, str) else cache
        return _no_cache(error.strerror or type(error).__name__, path, error.errno)
    if isinstance(error, errors.XetDownloadError | RuntimeError):
        # A library of its own brings the bytes then, which does not say what it was refused.
        there = next(path for path in (Path(cache), *Path(cache).parents) if path.exists())
        if not os.access(there, os.W_OK):
            return _no_cache("not writable", cache, errno.EACCES)
        if shutil.disk_usage(there).free < _LEAST_BYTES:
            return _no_cache("no space left on device", cache, errno.ENOSPC)
    return None


def _no_cache(got: str, path: str, number: int) -> DiskError:
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return DiskError(
        "no room for the base model" if full else "huggingface-hub's cache cannot be used",
        where=path,
        got=got,
        next_step="free some space, or set HF_HOME to a folder with more"
        if full
        else "make it readable and writable, or set HF_HOME to a folder that is",
    )


def _network_error(error: Exception, where: str) -> Exception:
    from huggingface_hub import errors

    name = type(error).__name__
    is_http = type(error).__module__.startswith(("httpx", "httpcore"))
    if (is_http and name == "RemoteProtocolError") or _is_plain(error):
        return TransientError(
            "what the Hub sent is not whole",
            where=where,
            got=_cause(error) if is_http else "fewer bytes than were announced",
            next_step="run again; what has come is kept",
        )
    known = errors.XetDownloadError | errors.HfHubHTTPError | OSError | RuntimeError
    if is_http or isinstance(error, known):
        return TransientError("the Hub did not answer", where=where, got=name)
    return error


def _cause(error: Exception) -> str:
    """Return what our own client, which knows more, raised where it did."""
    ours = error.__cause__
    return ours.what if isinstance(ours, LoaderError) else type(error).__name__


def unanswered(error: TransientError) -> TransientError:
    """Return what to raise where a request of huggingface-hub's met *error* on its way."""
    return TransientError(
        "the Hub did not answer",
        where=error.where,
        expected=error.expected,
        got=", ".join(filter(None, (error.what, error.got))),
        next_step=error.next_step,
    )


def _is_plain(error: Exception) -> bool:
    """Return whether it is what huggingface-hub raises where a file is not of the size it was told.

    An OSError of its own, without a number.
    """
    return type(error) is OSError and error.errno is None


def _of_status(error: Exception, status: int, where: str) -> FetchError:
    if status < 500 and status not in _PASSING:
        return FetchError("the Hub refuses", where=where, got=f"HTTP {status}")
    found = TransientError("the Hub does not answer now", where=where, got=f"HTTP {status}")
    found.busy = status in _BUSY
    headers: Mapping[str, str] = getattr(getattr(error, "response", None), "headers", None) or {}
    found.retry_after_s = retry_after_s(headers.get("Retry-After", ""))
    return found


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_network(error: Exception) -> bool:
    from huggingface_hub import errors

    of_http = type(error).__module__.startswith(("httpx", "httpcore"))
    return of_http or isinstance(error, errors.HfHubHTTPError)
