"""Services that the tests of stores share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.stores import moto


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """moto's S3, started once."""
    with moto.serving(tmp_path_factory.mktemp("moto")) as url:
        yield url
