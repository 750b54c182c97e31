"""Secrets by name: Truss's look-up, its mounted files and variables, the tools' own variables."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from loader.errors import ConfigError
from loader.json_text import parse_json

SECRETS_FOLDER = Path("/secrets")
_S3_NAMES = {
    "access_key_id": ("aws_access_key_id",),
    "secret_access_key": ("aws_secret_access_key",),
    "session_token": ("aws_session_token",),
    "region": ("aws_region", "aws_region_name", "aws_default_region"),
}
_S3_DOCUMENTS = ("aws_secret_json", "aws-secret-json")  # all of them in one, as Truss's caches take


@dataclass(frozen=True, slots=True)
class Secret:
    """A text that is shown to nobody who does not ask for its value."""

    value: str = field(repr=False)


class Secrets(Protocol):
    """Look-up only, as Truss gives them: iterating over them raises."""

    def __getitem__(self, key: str, /) -> str: ...


@dataclass(frozen=True, slots=True)
class S3Credentials:
    """What Truss's secrets hold for S3. Without a key, boto3 finds one by its own chain."""

    access_key_id: Secret | None = None
    secret_access_key: Secret | None = None
    session_token: Secret | None = None
    region: str | None = None

    def __post_init__(self) -> None:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ConfigError(
                "half of the credentials for S3",
                where="Truss's secrets",
                expected="aws_access_key_id and aws_secret_access_key",
                next_step="add the other secret, or remove this one",
            )


def find_secret(name: str, variables: tuple[str, ...], secrets: Secrets | None) -> Secret | None:
    """Return a secret from Truss, its mounted file or variable, or the tool's own *variables*."""
    if secrets is not None:
        try:
            return Secret(secrets[name].strip())
        except Exception:  # Truss raises a type of its own, which only a pod can import
            pass
    mounted = SECRETS_FOLDER / name
    if mounted.is_file():
        return Secret(mounted.read_text(encoding="utf-8").strip())
    for variable in (f"TRUSS_SECRET_{name}", *variables):
        if value := os.environ.get(variable, "").strip():
            return Secret(value)
    return None


def find_s3_credentials(secrets: Secrets | None) -> S3Credentials:
    """Return the credentials for S3 among Truss's secrets: one by one, or in one JSON object.

    Raises:
        ConfigError: half of them, or text that is no JSON object.
    """
    together = _document(secrets)
    found: dict[str, Secret] = {}
    for part, names in _S3_NAMES.items():
        for name in names:
            secret = find_secret(name, (), secrets) or together.get(name)
            if secret is not None and secret.value:
                found.setdefault(part, secret)
    region = found.pop("region", None)
    return S3Credentials(**found, region=region.value if region else None)


def _document(secrets: Secrets | None) -> dict[str, Secret]:
    for name in _S3_DOCUMENTS:
        secret = find_secret(name, (), secrets)
        if secret is None:
            continue
        try:
            fields = parse_json(secret.value)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise ConfigError(
                "a secret that is no JSON object",
                where=f"the secret {name}",
                expected='{"aws_access_key_id": …, "aws_secret_access_key": …, "aws_region": …}',
                next_step="correct the secret",
            )
        return {str(k): Secret(v) for k, v in fields.items() if isinstance(v, str)}
    return {}
