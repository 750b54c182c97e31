"""What botocore raises, and what S3 answers to a URL of ours -> podloader's errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from loader.errors import ConfigError, DeniedError, ExpiredError, FetchError, TransientError

_DENIED = {
    "AccessDenied",
    "AllAccessDisabled",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "403",
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
_NEXT_STEPS = {
    "RequestTimeTooSkewed": "set this machine's clock",
    "PermanentRedirect": "name the bucket's region: the secret aws_region, or AWS_DEFAULT_REGION",
    "AuthorizationHeaderMalformed": "name the bucket's region: the secret aws_region, or "
    "AWS_DEFAULT_REGION; if it is right, check the credentials",
}
_DENIED_STEP = "check the credentials, their region, and that they may list and read there"
_EXPIRED_STEP = "give new ones and run again; what has been fetched is kept"
_ABSENT = {"NoSuchBucket", "NoSuchKey", "NotFound", "404"}
_HELD = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_UNKNOWN = {"NotImplemented", "501"}


def translate_error(error: Exception, where: str) -> Exception:
    """Return what to raise for an *error* of botocore; itself where it is none of them."""
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return _translate_code(code, status, where)
    if isinstance(
        error,
        exceptions.NoCredentialsError
        | exceptions.PartialCredentialsError
        | exceptions.CredentialRetrievalError
        | exceptions.ProfileNotFound
        | exceptions.TokenRetrievalError,
    ):
        is_named = isinstance(error, exceptions.ProfileNotFound)
        return ConfigError(
            "no credentials for S3",
            where=where,
            got=type(error).__name__,
            next_step="correct AWS_PROFILE, or the files that hold the profiles"
            if is_named
            else "give the secrets aws_access_key_id and aws_secret_access_key, the AWS_* "
            "variables, or a role",
        )
    if isinstance(error, exceptions.ParamValidationError | ValueError):
        return ConfigError(
            "not a place in S3",
            where=where,
            expected="s3://<bucket>/<prefix>",
            got=type(error).__name__,
            next_step="correct the bucket's name",
        )
    if isinstance(error, exceptions.BotoCoreError | OSError):
        return TransientError(
            "S3 did not answer",
            where=where,
            got=type(error).__name__,
            next_step="check HTTPS_PROXY and HTTP_PROXY"
            if isinstance(error, exceptions.ProxyConnectionError)
            else "check s3_endpoint_url, and that this machine reaches it",
        )
    return error


def is_absent(error: Exception) -> bool:
    """Return whether S3 says that there is no such object."""
    return _code(error) in _ABSENT


def is_held(error: Exception) -> bool:
    """Return whether S3 says that there is an object, or will be one, where none should be."""
    return _code(error) in _HELD


def is_unknown(error: Exception) -> bool:
    """Return whether a service says that it does not know what was asked for."""
    return _code(error) in _UNKNOWN


def _code(error: Exception) -> str:
    from botocore.exceptions import ClientError

    if not isinstance(error, ClientError):
        return ""
    return str(error.response.get("Error", {}).get("Code", ""))


def unanswered(error: TransientError) -> TransientError:
    """Return what to raise where a request of boto3's met *error* on its way."""
    return TransientError(
        "S3 did not answer",
        where=error.where,
        expected=error.expected,
        got=", ".join(filter(None, (error.what, error.got))),
        next_step="check s3_endpoint_url, and that this machine reaches it",
    )


@contextlib.contextmanager
def refusals_translated(where: str) -> Iterator[None]:
    """Let what is said of a refused URL, in the block, be said of the credentials that signed it.

    *where* is the artifact.
    """
    try:
        yield
    except ExpiredError as error:
        raise _expired(where, error.got) from None
    except DeniedError as error:
        raise _denied(where, error.got) from None


def _expired(where: str, got: str) -> ExpiredError:
    return ExpiredError(
        "the credentials for S3 have expired", where=where, got=got, next_step=_EXPIRED_STEP
    )


def _denied(where: str, got: str) -> DeniedError:
    return DeniedError("S3 refuses access", where=where, got=got, next_step=_DENIED_STEP)


def _translate_code(code: str, status: int, where: str) -> FetchError:
    got = f"HTTP {status}, {code}" if code else f"HTTP {status}"
    if code in _EXPIRED:
        return _expired(where, got)
    if step := _NEXT_STEPS.get(code):
        return FetchError("S3 refuses the request", where=where, got=got, next_step=step)
    if code in _DENIED or status in (401, 403):
        return _denied(where, got)
    if code in _ABSENT or status == 404:
        return FetchError(
            "no such bucket or object", where=where, got=got, next_step="correct the URL"
        )
    if status >= 500 or status == 429 or code in ("SlowDown", "RequestTimeout"):
        return TransientError("S3 asks to try later", where=where, got=got)
    return FetchError("S3 refuses the request", where=where, got=got)
