"""Errors carry fields and no secrets."""

from __future__ import annotations

import logging

import pytest

from loader import errors, log_lines
from loader.errors import FetchError, LoaderError, RequestError, redact
from loader.types import Artifact

SIGNED = "https://user:pw@b.s3.test/k%20ey?AWSAccessKeyId=AKIA&Signature=S3CR3T&Expires=1"


def test_redact_takes_query_and_userinfo_out() -> None:
    text = redact(f"GET {SIGNED} failed, see ({SIGNED})")
    assert "S3CR3T" not in text
    assert "AKIA" not in text
    assert "pw" not in text
    assert text.endswith("see (https://b.s3.test/k%20ey?…)")


@pytest.mark.parametrize(
    "text",
    [
        "http://h/my dir/x y.bin?Expires=1&Signature=S3CR3T",
        "http://h/x.bin?response-content-disposition='a'&Signature=S3CR3T",
        'http://h/x?a="b"&X-Amz-Signature=S3CR3T&X-Amz-Security-Token=S3CR3T',
        "HTTPS://h/x?S3CR3T",
        "http://h/<x>.bin?S3CR3T",
        "http://h/x\n.bin?X-Amz-Credential=S3CR3T&AWSAccessKeyId=S3CR3T",
        "http://h/x?a=\t&Signature=S3CR3T",
        "http://h/x#Signature=S3CR3T",
        "az://c/x?sv=1&sig=S3CR3T",
        "listing.json?Signature=S3CR3T",
        "http://user:S3CR3T@S3CR3T@h/x",
        "http://user:it's-S3CR3T@h/x",
        "http://user:S3CR3T/S3CR3T@h:80/x",
        "s3://S3CR3T:S3CR3T/+@bucket/x",
    ],
)
def test_what_is_no_right_url_is_redacted_too(text: str) -> None:
    for shown in (redact(text), redact(f"{text}\n"), redact(f"see {text}, {text}")):
        assert "S3CR3T" not in shown
        assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/what?/a=b@c",
        "http://h:80/x@y",
        "http://h/x\ndid you mean 'y'?\n",
        "http://[::1]:80/a@b",
        "--set name=value",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


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


@pytest.mark.parametrize(
    "url",
    [
        "http://h/x?Expires=1&Signature=S3CR3T S3CR3T",
        "http://h/x?Expires=1&Signature=\nS3CR3T",
        "http://h/x?a b=S3CR3T&c=d",
        "http://h/x%3FX-Amz-Signature=S3CR3T&Expires=1",
        "http://h/x%3FX-Amz-Signature%3DS3CR3T%26a",
        "http://h/x%253FX-Amz-Signature%253DS3CR3T",
        "http://h/x\u2028?Signature=S3CR3T",
        "http://h/x?\x00S3CR3T",
        "http://us er:S3CR3T@h/x",
        "http://user:S3C R3T S3CR3T@h/x",
        "http://S3CR3T S3CR3T@h/x",
        "http://user:S3CR3T?S3CR3T@h/x",
        "http://user:S3CR3T#S3CR3T@h/x",
        "s3://key:S3CR3T S3CR3T@bucket/x",
    ],
)
def test_malformed_urls_hold_secrets_too(url: str) -> None:
    """In a text, nobody can tell where a URL with blanks ends; where it stands alone, one can."""
    error = FetchError("what", where=url, got="" if url.endswith("S3CR3T S3CR3T") else f"a {url}")
    artifact = Artifact("j", 0, "f", url)
    for text in (error.where, str(error), artifact.source, str(error.to_json())):
        assert "S3CR3T" not in text
        assert "R3T" not in text


FORGED = "x\nERROR forged\r\u2028\u2029\x85\x1b[31m\u202egnp.exe\u2066\u200f\ufeff\ud800"


def test_nobody_forges_a_line_of_an_error() -> None:
    error = FetchError(FORGED, where=FORGED, got=FORGED, expected=FORGED, problems=[FORGED])
    text = str(error)
    assert len(text.splitlines()) == 5
    assert not any(line.startswith("ERROR") for line in text.splitlines())
    assert all(letter.isprintable() for line in text.splitlines() for letter in line)
    text.encode()


@pytest.mark.parametrize("as_json", [False, True])
def test_nobody_forges_a_line_of_the_log(
    as_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("podloader")
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(log, name, getattr(log, name))
    monkeypatch.setattr(log, "handlers", [])
    log_lines.set_up_logging(as_json=as_json)
    log.info("%s: %d of %r, %s", FORGED, 3, FORGED, FetchError(FORGED))
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1
    assert all(letter.isprintable() for letter in text.rstrip("\n"))


def test_what_is_foreign_has_no_say_in_how_long_an_error_is() -> None:
    error = FetchError("w" * 10**6, got="g" * 10**6, problems=["p"] * 10**5)
    assert len(str(error)) < 10**5
    assert error.problems[-1] == "and 99000 more"
