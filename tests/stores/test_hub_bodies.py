"""Large files of the Hub: by our own client, in ranges, past Xet's library."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from loader.stores.hub_bodies import LARGE_BYTES, RANGE_BYTES
from tests.stores.hub import COMMIT, Hub
from tests.stores.test_hub import SCRIPT, ask

NAME = "model.safetensors"
SIZE = LARGE_BYTES + 5 * RANGE_BYTES + 17
WITH_XET = {"HF_HUB_DISABLE_XET": "0"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / NAME).write_bytes(random.Random(1).randbytes(SIZE))
    found = Hub(folder)
    found.xet = True
    yield found
    found.shutdown()
    found.server_close()


def is_whole(hub: Hub) -> bool:
    home = hub.folder.parent / "home" / "hub" / "models--org--base" / "snapshots" / COMMIT
    return (home / NAME).read_bytes() == (hub.folder / NAME).read_bytes()


def test_what_lies_in_xet_comes_by_http_in_ranges(hub: Hub) -> None:
    assert ask(hub, **WITH_XET).startswith(COMMIT)
    assert is_whole(hub)
    assert not [path for path, _ in hub.requests if "xet-read-token" in path]
    spans = [span for span in hub.spans if span]
    assert len(spans) == len(set(spans)) == -(-SIZE // RANGE_BYTES) - 1


def test_ranges_that_are_not_honoured(hub: Hub) -> None:
    hub.ranges = False
    assert ask(hub, **WITH_XET).startswith(COMMIT)
    assert is_whole(hub)
    assert hub.spans.count("") >= 2


@pytest.mark.parametrize("status", [0, 403, 503])
def test_a_range_that_fails_is_asked_for_anew(hub: Hub, status: int) -> None:
    """A signature may end while a file comes; the Hub then signs anew."""
    script = SCRIPT.replace("progress = LogProgress()", _FAULTY)
    assert (
        ask(hub, script=script, status=str(status), **WITH_XET).splitlines()[-1].startswith(COMMIT)
    )
    assert is_whole(hub)


_FAULTY = """
import os
from loader.errors import ExpiredError, TransientError
from loader.http.client import HttpClient
plain, faults = HttpClient.get, [3, 9]
def get(self, url, **given):
    faults[:] = [count - 1 for count in faults]
    if 0 in faults:
        raise (ExpiredError if os.environ["status"] == "403" else TransientError)("x", where=url)
    return plain(self, url, **given)
HttpClient.get = get
progress = LogProgress()
"""


def test_xet_for_what_http_does_not_give(hub: Hub) -> None:
    """More than 50 GB; its token is asked for then."""
    small = "from huggingface_hub import constants as c\nc.MAX_HTTP_DOWNLOAD_SIZE = 10**7\n"
    assert "makes no sense" in ask(hub, script=small + SCRIPT, **WITH_XET)  # it gives no token
    assert [path for path, _ in hub.requests if "xet-read-token" in path]
    assert "without Xet" in ask(hub, script=small + SCRIPT, HF_HUB_DISABLE_XET="1")
