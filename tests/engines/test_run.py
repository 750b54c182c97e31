"""The newest proved release answers, in a process and as a server. All: `make engines`."""

from __future__ import annotations

import pytest

from loader.serve.vllm.releases import PROVED, installed_release, is_proved
from tests.engines.overlay import Run, run_on
from tests.engines.sources import UnavailableError

_TELLING = [
    "tests/serve/vllm/test_engine_adapters.py",
    "tests/pod/test_serving.py",
    "-k",
    "added or refused or unknown or differ or status or sigterm or crash",
]


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_the_newest_release_answers() -> None:
    assert is_proved(installed_release())
    try:
        run = run_on(PROVED[-1], _TELLING)
    except UnavailableError as error:
        pytest.skip(str(error))
    if run is Run.NO_ENGINE:
        pytest.skip("vLLM itself does not answer on these compiled parts")
    assert run is Run.PASSED
