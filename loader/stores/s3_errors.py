"""What botocore raises -> podloader's errors."""

from __future__ import annotations

from loader.errors import ConfigError, DeniedError, FetchError, TransientError

_DENIED = {
    "AccessDenied",
    "AllAccessDisabled",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "403",
}
_ABSENT = {"NoSuchBucket", "NoSuchKey", "NotFound", "404"}


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
        return ConfigError(
            "no credentials for S3",
            where=where,
            got=type(error).__name__,
            next_step="give the secrets aws_access_key_id and aws_secret_access_key, the AWS_* "
            "variables, or a role",
        )
    if isinstance(error, exceptions.ParamValidationError | ValueError):
        return ConfigError(
            "not a place in S3", where=where, expected="s3://<bucket>/<prefix>", got=str(error)
        )
    if isinstance(error, exceptions.SSLError):
        return FetchError(
            "the server's certificate is not trusted",
            where=where,
            next_step="set ca_bundle to the PEM file of the authority that signed it",
        )
    if isinstance(error, exceptions.BotoCoreError | OSError):
        return TransientError(
            "S3 did not answer",
            where=where,
            got=type(error).__name__,
            next_step="check s3_endpoint_url, and that this machine reaches it",
        )
    return error


def _translate_code(code: str, status: int, where: str) -> FetchError:
    got = f"HTTP {status}, {code}" if code else f"HTTP {status}"
    if code in _DENIED or status in (401, 403):
        return DeniedError(
            "S3 refuses access",
            where=where,
            got=got,
            next_step="check the credentials, their region, and that they may list and read there",
        )
    if code in _ABSENT or status == 404:
        return FetchError(
            "no such bucket or object", where=where, got=got, next_step="correct the URL"
        )
    if status >= 500 or status == 429 or code in ("SlowDown", "RequestTimeout"):
        return TransientError("S3 asks to try later", where=where, got=got)
    return FetchError("S3 refuses the request", where=where, got=got)
