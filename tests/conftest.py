"""Fixtures of more than one room."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from loader.http.client import HttpClient, HttpOptions
from loader.stores.presigned import PresignedStore
from tests.origin import FaultyOrigin, serving
from tests.stores import moto


@pytest.fixture(autouse=True)
def logger_that_pytest_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lines reach ``caplog``, though an engine in this process has set up logging."""
    monkeypatch.setattr(logging.getLogger("podloader"), "propagate", True)


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[FaultyOrigin]:
    """An origin of signed URLs over an empty folder."""
    with serving(tmp_path / "origin") as found:
        yield found


@pytest.fixture
def client() -> Iterator[HttpClient]:
    """A client that gives up soon."""
    found = HttpClient(HttpOptions(connect_timeout_s=2, stall_timeout_s=0.5))
    yield found
    found.close()


@pytest.fixture
def store(client: HttpClient) -> PresignedStore:
    """A store over that client."""
    return PresignedStore(client)


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """moto's S3, started once."""
    with moto.serving(tmp_path_factory.mktemp("moto")) as url:
        yield url
