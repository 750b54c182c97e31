"""Signed URLs: when they end, and what a refusal means."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from urllib.parse import unquote

from loader.errors import DeniedError, ExpiredError, FetchError

_SIGNED = re.compile(r"(?:^|&)(x-(?:amz|goog)-(?:date|expires)|expires|se)=([^&#]+)", re.IGNORECASE)
_SIGNERS = ("x-amz-", "x-goog-")
_CODE = re.compile(rb"<Code>(\w{1,64})</Code>")
_EXPIRED_CODES = {"ExpiredToken", "RequestExpired", "TokenRefreshRequired"}


def expiry(url: str) -> datetime | None:
    """Return when the signature of *url* ends.

    SigV2's ``Expires``; SigV4's date plus seconds, as Google's; a shared access signature's ``se``.
    Sources: Amazon S3 API reference, "Query string authentication"; Google Cloud Storage, "Signed
    URLs"; Azure Storage, "Create a service SAS".
    """
    found = _SIGNED.findall(url.partition("?")[2])
    query = {name.lower(): value for name, value in reversed(found)}
    try:
        for signer in _SIGNERS:
            if date := query.get(f"{signer}date"):
                signed = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
                return signed + timedelta(seconds=int(query[f"{signer}expires"]))
        if "expires" in query:
            return datetime.fromtimestamp(int(query["expires"]), UTC)
        if "se" in query:
            ends = datetime.fromisoformat(unquote(query["se"]))
            return ends if ends.tzinfo else ends.replace(tzinfo=UTC)
    except (KeyError, ValueError, OverflowError):
        return None
    return None


def refused(url: str, status: int, reason: str, body: bytes, date: str = "") -> FetchError:
    """Return the error for a final refusal. *body* may hold S3's ``<Code>``.

    *date* is what the origin's clock said, which counts where this machine's is slow.
    """
    match = _CODE.search(body)
    code = match[1].decode() if match else ""
    got = f"HTTP {status} {reason}" + (f", {code}" if code else "")
    ends = expiry(url)
    passed = ends is not None and ends <= _now(date)
    if status in (400, 401, 403) and (passed or code in _EXPIRED_CODES):
        when = f" at {ends:%Y-%m-%d %H:%M:%S} UTC" if ends and passed else ""
        return ExpiredError(
            f"the signed URL has expired{when}",
            where=url,
            got=got,
            next_step="get a new listing (truss train get_checkpoint_urls) and run again; what has "
            "been fetched is kept",
        )
    if status in (401, 403):
        return DeniedError(
            "the origin refuses access",
            where=url,
            got=got,
            next_step="check that the URL is whole and that its signer may read the object",
        )
    if status in (404, 410):
        return FetchError(
            "the object is not there",
            where=url,
            got=got,
            next_step="get a new listing; the job may have removed the file",
        )
    return FetchError("the origin refuses the request", where=url, got=got)


def _now(date: str) -> datetime:
    from email.utils import parsedate_to_datetime  # for which a first request should not wait

    now = datetime.now(UTC)
    try:
        told = parsedate_to_datetime(date)
    except ValueError:
        return now
    return max(now, told if told.tzinfo else told.replace(tzinfo=UTC))
