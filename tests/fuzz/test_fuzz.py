"""The corpus, and a moment of fuzzing for each target; ``make fuzz`` takes longer.

``FUZZ_SECONDS``: how long each is fuzzed here, 1 by default.
"""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
from pathlib import Path

import pytest

from tests.fuzz.__main__ import CORPUS, fuzz
from tests.fuzz.targets import TARGETS, run

SECONDS = int(os.environ.get("FUZZ_SECONDS", "1"))


def corpus(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus(name: str) -> None:
    seeds = corpus(name)
    assert len(seeds) > 5
    for data in seeds:
        run(name, data)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_near_the_corpus(name: str) -> None:
    """Without atheris, which not every machine has a wheel of."""
    chance, seeds = random.Random(name), corpus(name)
    for _ in range(1000):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data) + 1)
            other = chance.choice(seeds)
            piece = other[chance.randrange(len(other) + 1) :][: chance.randint(0, 30)]
            data[at : at + chance.randint(0, 8)] = chance.choice(
                [piece, bytes([chance.randrange(256)]), b"\xff" * 4, b"", piece * 20]
            )
        run(name, bytes(data))


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("name", TARGETS)
def test_a_moment_of_fuzzing(name: str, tmp_path: Path) -> None:
    shutil.copytree(CORPUS / name, tmp_path / name)
    code, told = fuzz(name, SECONDS, tmp_path)
    assert code == 0, told
