"""An origin of one base and five adapters for every pod."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import FaultyOrigin, serving

LONGEST = 32_768  # tokens; long enough that an answer outlives every limit
JOBS = ("joba", "jobb", "jobc", "jobd")
LATER = "jobe"  # of which a request asks for a checkpoint


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The origin's folder: ``base/base/`` and a checkpoint of each job."""
    folder = tmp_path_factory.mktemp("published")
    base = tiny_llama(folder / "base", max_position_embeddings=LONGEST)
    origin = FaultyOrigin(folder / "origin")
    shutil.copytree(base, origin.folder("base") / "base")
    for seed, job in enumerate((*JOBS, LATER), start=1):
        lora = train_or_draw_lora(base, folder / job, seed=seed, spread=0.3)
        shutil.copytree(lora, origin.folder(job) / "checkpoint-1")
    origin.server_close()
    return folder / "origin"


@pytest.fixture(scope="module")
def origin(published: Path) -> Iterator[FaultyOrigin]:
    """A server of its own for each file of tests."""
    with serving(published) as found:
        yield found
