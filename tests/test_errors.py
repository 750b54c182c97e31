"""Errors carry fields and no secrets."""

from __future__ import annotations

import pytest

from loader import errors
from loader.errors import FetchError, LoaderError, RequestError, redact
from loader.types import Artifact

SIGNED = "https://user:pw@b.s3.test/k%20ey?AWSAccessKeyId=AKIA&Signature=S3CR3T&Expires=1"


def test_redact_takes_query_and_userinfo_out() -> None:
    text = redact(f"GET {SIGNED} failed, see ({SIGNED})")
    assert "S3CR3T" not in text
    assert "AKIA" not in text
    assert "pw" not in text
    assert "b.s3.test/k%20ey" in text


def test_every_field_is_redacted() -> None:
    error = FetchError(
        SIGNED, where=SIGNED, expected=SIGNED, got=SIGNED, next_step=SIGNED, problems=[SIGNED]
    )
    for shown in (str(error), repr(error), str(error.to_json()), str(error.args)):
        assert "S3CR3T" not in shown


def test_artifact_repr_has_no_url() -> None:
    assert "S3CR3T" not in repr(Artifact("j", 0, "f", SIGNED))


def all_errors(base: type[LoaderError] = LoaderError) -> list[type[LoaderError]]:
    return [base, *(e for sub in base.__subclasses__() for e in all_errors(sub))]


@pytest.mark.parametrize("error", all_errors())
def test_every_error_is_drawn_in_the_tree(error: type[LoaderError]) -> None:
    assert errors.__doc__ is not None
    assert error.__name__ in errors.__doc__
    assert error("what").to_json()["error"] == error.__name__


def test_request_error_has_a_status() -> None:
    assert RequestError("bad").status == 400
    assert RequestError("gone", status=404).status == 404
