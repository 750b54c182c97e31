"""When signed URLs end, in both ways of signing."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from loader.errors import DeniedError, ExpiredError, FetchError
from loader.http.expiry import expiry, refused


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("AWSAccessKeyId=A&Signature=s&Expires=86400", datetime(1970, 1, 2, tzinfo=UTC)),
        ("X-Amz-Date=20260101T000000Z&X-Amz-Expires=60", datetime(2026, 1, 1, 0, 1, tzinfo=UTC)),
        ("X-Amz-Date=20260101T000000Z", None),
        ("X-Amz-Date=yesterday&X-Amz-Expires=60", None),
        ("X-Goog-Date=20260101T000000Z&X-Goog-Expires=60", datetime(2026, 1, 1, 0, 1, tzinfo=UTC)),
        ("sp=r&se=2026-01-01T00%3A01%3A00Z&sig=x", datetime(2026, 1, 1, 0, 1, tzinfo=UTC)),
        ("se=2026-01-01&sig=x", datetime(2026, 1, 1, tzinfo=UTC)),
        ("se=soon", None),
        ("date=20260101T000000Z&Expires=86400", datetime(1970, 1, 2, tzinfo=UTC)),
        ("Expires=soon", None),
        ("Expires=99999999999999999999", None),
        ("", None),
    ],
)
def test_expiry(query: str, expected: datetime | None) -> None:
    assert expiry(f"https://h/x?{query}") == expected


@pytest.mark.parametrize(
    ("status", "query", "body", "kind"),
    [
        (403, "Expires=86400", b"", ExpiredError),
        (403, "Expires=99999999999", b"<Error><Code>AccessDenied</Code></Error>", DeniedError),
        (403, "", b"<Error><Code>AccessDenied</Code></Error>", DeniedError),
        (400, "", b"<Error><Code>ExpiredToken</Code></Error>", ExpiredError),
        (404, "Expires=86400", b"", FetchError),
        (400, "", b"", FetchError),
    ],
)
def test_what_a_refusal_means(status: int, query: str, body: bytes, kind: type) -> None:
    error = refused(f"https://h/x?{query}", status, "No", body)
    assert type(error) is kind
    if query == "Expires=86400" and kind is ExpiredError:
        assert "1970-01-02 00:00:00 UTC" in str(error)


@pytest.mark.parametrize(
    ("date", "kind"),
    [
        ("Fri, 01 Jan 2100 00:00:01 GMT", ExpiredError),
        ("Thu, 31 Dec 2099 23:59:59 -0000", DeniedError),
        ("soon", DeniedError),
        ("", DeniedError),
    ],
)
def test_the_origins_clock_counts_where_ours_is_slow(date: str, kind: type) -> None:
    error = refused("https://h/x?Expires=4102444800", 403, "No", b"", date)
    assert type(error) is kind
    assert ("2100-01-01 00:00:00 UTC" in str(error)) is (kind is ExpiredError)
