"""What an answer, or the lack of one, means: the object it is of, or one of our errors.

Statuses are translated here and nowhere else.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import time

from loader.errors import ChangedError, FetchError, TransientError
from loader.http.checksums import read_checksums
from loader.http.expiry import refused
from loader.http.grammar import AnswerError, FramingError, read_length
from loader.http.objects import ObjectInfo, is_same_version
from loader.http.proxies import Proxy, refused_by_proxy
from loader.http.request import Wanted
from loader.http.response import Answer, UnansweredError

_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_BUSY = {429, 503}
# RFC 9110, 14.4. For an empty object some say 0--1 or the like, which no grammar has.
_CONTENT_RANGE = re.compile(
    r"bytes (?:(?P<start>[0-9]{1,19})-(?P<last>[0-9]{1,19})|\*|[0-9]-{1,2}[0-9]?(?=/0$))"
    r"/(?P<total>[0-9]{1,19}|\*)$",
    re.IGNORECASE,
)
_BODY_SHOWN = 64 * 1024
_AUTHORITY_STEP = "set ca_bundle to the PEM file of the authority that signed it"
_CLOCK_STEP = "check this machine's clock; if it is right, the server needs a new certificate"
_HOST_STEP = (
    "correct the URL's host (a proxy or a name server may lead to another one), or get a "
    "certificate that has it among its subject alternative names: a common name does not count"
)
_CERTIFICATE_STEPS = {9: _CLOCK_STEP, 10: _CLOCK_STEP, 62: _HOST_STEP, 64: _HOST_STEP}


class UnsizedError(FetchError):
    """Nothing tells how long an object is."""


def check_status(url: str, answer: Answer, wanted: Wanted) -> None:
    """Raise the error that the answer's status stands for, if it does; see ``HttpClient.get``."""
    status = answer.status
    if status in (200, 206) or (status == 416 and _may_be_empty(wanted)):
        return
    if status in _TRANSIENT:
        error = TransientError(
            f"HTTP {status} {answer.reason}",
            where=url,
            next_step="run again later; what has been fetched is kept",
        )
        error.retry_after_s = retry_after_s(answer.fields.get("retry-after", ""))
        error.busy = status in _BUSY
        raise error
    if status == 412:
        raise _changed(url, "it is another version now")
    if status == 416:
        raise _changed(url, "it is shorter now")
    if status == 407:  # of a plain request; a tunnel is refused before there is an answer
        raise refused_by_proxy(url, f"HTTP {status} {answer.reason}")
    body = b""
    with contextlib.suppress(OSError, AnswerError):  # the status says enough
        body = answer.read(_BODY_SHOWN)
    raise refused(url, status, answer.reason, body, answer.fields.get("date", ""))


def object_info(url: str, answer: Answer, wanted: Wanted) -> ObjectInfo:
    """Return the version that the answer is of.

    Raises:
        ChangedError: the object is shorter than the span that was asked for.
        UnsizedError: nothing tells how long it is.
        FetchError: the answer does not say what it holds, or it is another range.
    """
    fields = answer.fields
    tag = fields.get("etag", "")
    version = tag if tag.startswith(('"', 'W/"')) else fields.get("last-modified")
    checksums = read_checksums(fields.items())
    match = _CONTENT_RANGE.match(fields.get("content-range", ""))
    if answer.status == 200:
        if match is not None and match["start"] and not _is_all(match):
            raise _unclear(url, "a whole object, as status 200 says", match[0])
        size = read_length(fields)
        size = wanted.known_bytes if size is None else size
        if size is None and wanted.is_sized:
            raise UnsizedError("the origin does not tell the object's size", where=url)
        return ObjectInfo(size or 0, version, False, checksums)
    if match is not None and match["total"] == "0":
        return ObjectInfo(0, version, True, checksums)  # whatever range of nothing that is
    if answer.status == 416 and (match is None or match["total"] == "*"):
        if wanted.known_bytes != 0:  # an empty object has no first byte; others may refuse ranges
            raise UnsizedError("a range is refused, and no size told", where=url)
        return ObjectInfo(0, version)
    if wanted.span is None or match is None:
        expected = "Content-Range: bytes <start>-<last>/<size>"
        raise _unclear(url, expected, fields.get("content-range") or "no Content-Range")
    total = wanted.known_bytes if match["total"] == "*" else int(match["total"])
    if match["start"] is None:
        raise _changed(url, "a range inside it is refused")
    if total is None:
        raise UnsizedError("the origin does not tell the object's size", where=url)
    held = int(match["start"]), int(match["last"]) + 1
    if held != (wanted.span[0], min(wanted.span[1], total)):
        raise FetchError(
            "the origin sent another range than was asked for",
            where=url,
            expected=f"bytes {wanted.span[0]}-{wanted.span[1] - 1}",
            got=match[0],
        )
    length = read_length(fields)
    if length is not None and length != held[1] - held[0] and not answer.is_chunked:
        raise TransientError(
            "an answer that is not as long as the range that it says it is",
            where=url,
            expected=f"{held[1] - held[0]} bytes",
            got=f"Content-Length: {length}",
        )
    return ObjectInfo(total, version, True, checksums)


def _is_all(held: re.Match[str]) -> bool:
    return int(held["start"]) == 0 and held["total"] in ("*", str(int(held["last"]) + 1))


def _unclear(url: str, expected: str, got: str) -> FetchError:
    return FetchError(
        "an answer that does not say which bytes it holds", where=url, expected=expected, got=got
    )


def check_version(url: str, info: ObjectInfo, asked: ObjectInfo | None) -> None:
    """Raise ChangedError where *info* is of another version than was asked for."""
    if asked is None:
        return
    if info.size_bytes != asked.size_bytes:
        raise _changed(url, f"{info.size_bytes} bytes instead of {asked.size_bytes}")
    if asked.version and info.version and not is_same_version(info.version, asked.version):
        raise _changed(url, f"version {info.version} instead of {asked.version}")


def leads_here(url: str) -> FetchError:
    """Return the error for an address that no file is fetched from."""
    return FetchError(
        "an address of this machine's own link, where clouds keep credentials",
        where=url,
        next_step="get a listing from a source that you trust, or set allow_local_urls",
    )


def _may_be_empty(wanted: Wanted) -> bool:
    """Only an empty object has no first bytes."""
    return wanted.span is not None and wanted.span[0] == 0 and wanted.version is None


def _changed(url: str, got: str) -> ChangedError:
    return ChangedError(
        "the object changed while it was being read",
        where=url,
        got=got,
        next_step="run again once nothing writes to it any more; get a new listing if it was moved",
    )


def retry_after_s(value: str) -> float | None:
    """Return the seconds that a ``Retry-After`` asks for, None where it is none."""
    value = value.strip()
    if value.isdecimal():
        return float(value)
    if not value:
        return None
    from email.utils import parsedate_to_datetime

    try:
        until = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return max(0.0, until.timestamp() - time.time())


def translate(error: BaseException, url: str, proxy: Proxy | None = None) -> BaseException:
    """Return ours for an error of the connection, which led to *proxy* if any; others as they are.

    ``X509_V_ERR_*`` have their numbers in openssl/x509_vfy.h.
    """
    got = f"on the way through {proxy}" if proxy else ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return FetchError(
            "the server's certificate is not trusted",
            where=url,
            got=", ".join(filter(None, (error.verify_message.rstrip("."), got))),
            next_step=_CERTIFICATE_STEPS.get(error.verify_code, _AUTHORITY_STEP),
        )
    if isinstance(error, socket.gaierror):
        return _passing("the host's name cannot be resolved", url, got)
    if isinstance(error, UnicodeError):  # of the host's name, which is looked for first
        return FetchError("the host's name is none", where=url, next_step="correct the URL")
    if isinstance(error, TimeoutError):
        return _passing("the connection brought nothing in time", url, got)
    if isinstance(error, UnansweredError):
        return _passing("the connection was closed without an answer", url, got)
    if isinstance(error, OSError):
        return _passing(error.strerror or type(error).__name__, url, got)
    if isinstance(error, FramingError):
        return FetchError(
            f"an answer whose end cannot be told: {error}",
            where=url,
            got=got,
            next_step="tell the server's or the proxy's operator; RFC 9112, 6.3 says what is right",
        )
    if isinstance(error, AnswerError):
        return _passing(f"not a whole HTTP answer: {error}", url, got)
    return error


def _passing(what: str, url: str, got: str) -> TransientError:
    return TransientError(
        what,
        where=url,
        got=got,
        next_step="check that this machine reaches the origin, then run again; what has been "
        "fetched is kept",
    )
