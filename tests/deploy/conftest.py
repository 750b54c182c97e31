"""One image for all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loader.scaffold.wheel import write_wheel
from tests.deploy.image import Image, build
from tests.pod.pods import needs_namespaces


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    needs_namespaces()
    folder = tmp_path_factory.mktemp("image")
    return build(write_wheel(folder), folder)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """What lies at /cache: only its own user may write there."""
    folder = tmp_path / "cache"
    folder.mkdir()
    os.chown(folder, 10001, 10001)
    return folder
