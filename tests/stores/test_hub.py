"""Base models through the real huggingface-hub, against a local Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stores.hub import COMMIT, Hub

SCRIPT = """
import logging, sys
logging.getLogger("podloader").addHandler(logging.StreamHandler(sys.stdout))
from loader.errors import LoaderError
from loader.fetch.progress import LogProgress
from loader.stores.hub import fetch_model
from loader.stores.hub_requests import ask_as_we_do
from loader.http.client import HttpOptions
from loader.http import pool
progress = LogProgress()
pool._PATIENCE_S = 0.5
ask_as_we_do(HttpOptions(stall_timeout_s=2.0))
try:
    name, revision = sys.argv[1], sys.argv[2] or None
    model = fetch_model(name, revision, progress=progress, token=sys.argv[3] or None)
    print(model.commit, *sorted(p.name for p in model.path.iterdir()))
except LoaderError as error:
    print(type(error).__name__, error.what)
"""

PROVE = SCRIPT.replace("token=sys", "prove=True, token=sys")

DESCRIBE = """
import sys
from loader.errors import LoaderError
from loader.stores.hub import describe_model
from loader.stores.hub_requests import ask_as_we_do
from loader.http.client import HttpOptions
ask_as_we_do(HttpOptions(stall_timeout_s=2.0))
try:
    found = describe_model(sys.argv[1], sys.argv[2] or None, token=sys.argv[3] or None)
    print(found.weight_bytes, found.config)
except LoaderError as error:
    print(type(error).__name__, error.what)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repo"
    folder.mkdir()
    for name in (
        "config.json",
        "consolidated.safetensors",
        "model.safetensors",
        "pytorch_model.bin",
        "tokenizer.json",
    ):
        (folder / name).write_text("{}")
    found = Hub(folder)
    yield found
    found.shutdown()
    found.server_close()


def ask(
    hub: Hub,
    repo: str = "org/base",
    revision: str = "",
    token: str = "",
    script: str = SCRIPT,
    **variables: str,
) -> str:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(hub.folder.parent / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", script, repo, revision, token],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_only_what_a_server_needs(hub: Hub) -> None:
    assert ask(hub, token="hf_x") == f"{COMMIT} config.json model.safetensors tokenizer.json"
    assert {token for path, token in hub.requests if "org/base" in path} == {"Bearer hf_x"}
    asked = len(hub.requests)
    assert COMMIT in ask(hub, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked


def test_pickled_weights_alone_are_refused(hub: Hub) -> None:
    for path in hub.folder.glob("*.safetensors"):
        path.unlink()
    assert "no safetensors" in ask(hub)


@pytest.mark.parametrize(
    ("repo", "revision", "said"),
    [
        ("org/none", "", "ConfigError no such base model"),
        ("org/gated", "", "ConfigError the base model is gated"),
        ("org/base", "none", "ConfigError no such revision"),
    ],
)
def test_refusals(hub: Hub, repo: str, revision: str, said: str) -> None:
    assert ask(hub, repo, revision).startswith(said)


def test_offline_and_not_in_the_cache(hub: Hub) -> None:
    assert "not in the cache" in ask(hub, HF_HUB_OFFLINE="1")
    small = SCRIPT.replace("progress=progress", "progress=progress, only='small files'")
    assert ask(hub, script=small) == f"{COMMIT} config.json tokenizer.json"
    assert "not in the cache" in ask(hub, HF_HUB_OFFLINE="1")
    assert ask(hub, script=small, HF_HUB_OFFLINE="1").startswith(COMMIT)
    weights = SCRIPT.replace("progress=progress", "progress=progress, only='weights'")
    assert "model.safetensors" in ask(hub, script=weights)
    assert COMMIT in ask(hub, HF_HUB_OFFLINE="1")


def test_a_model_is_described_without_its_weights(hub: Hub) -> None:
    (hub.folder / "config.json").write_text('{"hidden_size": 8}')
    (hub.folder / "model.safetensors").write_bytes(b"x" * 1000)
    for _ in range(2):  # the second finds the config in the cache
        assert ask(hub, script=DESCRIBE) == "1000 {'hidden_size': 8}"
    assert not [path for path, _ in hub.requests if path.endswith("safetensors")]
    assert ask(hub, "org/gated", script=DESCRIBE).startswith("ConfigError the base model is gated")
    assert ask(hub, script=DESCRIBE, HF_HUB_OFFLINE="1") == "None {'hidden_size': 8}"
    assert ask(hub, "org/other", script=DESCRIBE, HF_HUB_OFFLINE="1").startswith("FetchError")


def test_weights_that_rotted_in_the_cache_are_fetched_again(hub: Hub) -> None:
    content = b"x" * 1000
    (hub.folder / "model.safetensors").write_bytes(content)
    ask(hub)
    (cached,) = (hub.folder.parent / "home").rglob("snapshots/*/model.safetensors")
    cached.resolve().write_bytes(b"y" + content[1:])
    ask(hub)
    assert cached.read_bytes() != content, "nobody looked"
    asked = len(hub.requests)
    assert COMMIT in ask(hub, script=PROVE)
    assert cached.read_bytes() == content
    got = [path for path, _ in hub.requests[asked:] if "/resolve/" in path]
    assert {path.rpartition("/")[2] for path in got} == {"model.safetensors"}
    asked = len(hub.requests)
    ask(hub, script=PROVE)
    assert not [path for path, _ in hub.requests[asked:] if "/resolve/" in path]
    cached.resolve().write_bytes(b"y" + content[1:])
    told = ask(hub, script=PROVE, HF_HUB_OFFLINE="1")
    assert told.splitlines()[-1].startswith("FetchError")


def test_a_model_in_the_cache_is_described_offline(hub: Hub) -> None:
    (hub.folder / "model.safetensors").write_bytes(b"x" * 1000)
    ask(hub)
    assert ask(hub, script=DESCRIBE, HF_HUB_OFFLINE="1") == "1000 {}"


def test_a_hub_that_went_away_after_the_model_came(hub: Hub) -> None:
    ask(hub)
    hub.shutdown()
    hub.server_close()
    assert COMMIT in ask(hub)


WHERE = SCRIPT.replace("error.what", "error.what, '|', error.where, '|', error.got")


@pytest.mark.parametrize("place", ["a file/home", "/proc/none/home", "/sys/home"])
def test_a_cache_that_is_none(hub: Hub, place: str) -> None:
    (hub.folder.parent / "a file").write_text("")
    said = ask(hub, script=WHERE, HF_HOME=str(hub.folder.parent / place))
    assert said.startswith("DiskError huggingface-hub's cache cannot be used")
    assert place.partition("/home")[0] in said


def test_a_cache_that_takes_no_more(hub: Hub) -> None:
    (hub.folder / "model.safetensors").write_bytes(bytes(3 << 20))
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    said = ask(hub, script=limited + WHERE)
    assert said.startswith("DiskError no room for the base model | ")
    assert said.endswith("File too large")


def test_a_body_that_breaks_off(hub: Hub) -> None:
    (hub.folder / "model.safetensors").write_bytes(bytes(3 << 20))
    hub.cuts = ["model.safetensors"]
    told = ask(hub, script=AT_ONCE + SCRIPT)
    assert told.startswith("TransientError what the Hub sent is not whole")


def test_what_answers_is_no_hub(hub: Hub) -> None:
    hub.names_versions = False
    assert ask(hub).startswith("FetchError what answers is not the Hub")


def test_nobody_answers(hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()
    assert ask(hub).splitlines()[-1].startswith("TransientError the Hub did not answer")
    assert ask(hub, script=DESCRIBE).startswith("TransientError the Hub did not answer")


RETRIED = SCRIPT.replace("token=sys", "retries=2, token=sys")
AT_ONCE = "import time; time.sleep = lambda pause_s: None  # huggingface-hub's own pauses\n"
API, FILES = "/api/models/org/base", "/org/base/resolve/"


@pytest.mark.parametrize("status", [429, 401, 500, 503, 0])
def test_the_cache_serves_where_the_hub_does_not_say(hub: Hub, status: int) -> None:
    whole = ask(hub)
    hub.faults = [(API, status)] * 9
    told = ask(hub, token="hf_expired").splitlines()
    assert told[-1] == whole
    assert "org/base is taken from the cache" in told[0]


@pytest.mark.parametrize("status", [429, 401])
def test_half_a_model_in_the_cache_does_not_serve(hub: Hub, status: int) -> None:
    small = SCRIPT.replace("progress=progress", "progress=progress, only='small files'")
    ask(hub, script=small)
    hub.faults = [(API, status)] * 9
    told = ask(hub).splitlines()[-1]
    assert told.startswith("DeniedError" if status == 401 else "TransientError")
    assert "HF_HUB_OFFLINE" not in told


@pytest.mark.parametrize("path", [API, FILES])
@pytest.mark.parametrize("status", [429, 503, 500, 0])
def test_a_passing_failure_of_a_cold_start(hub: Hub, path: str, status: int) -> None:
    hub.faults = [(path, status)]
    assert ask(hub, script=RETRIED).startswith(COMMIT)
    assert not hub.faults


def test_what_does_not_pass_is_told_by_what_it_is(hub: Hub) -> None:
    hub.faults = [(FILES, 429)] * 999
    told = ask(hub, script=AT_ONCE + RETRIED).splitlines()[-1]
    assert told.startswith("TransientError the Hub does not answer now")


def test_the_files_that_an_index_names(hub: Hub) -> None:
    """``model-extra.safetensors`` has no number; what the Hub lacks is refused by its name."""
    (hub.folder / "model.safetensors").unlink()
    for name in ("model-00001-of-00001.safetensors", "model-extra.safetensors"):
        (hub.folder / name).write_text("{}")
    (hub.folder / "model.safetensors.index.json").write_text("{}")
    indexed = "indexed=['model-00001-of-00001.safetensors', 'model-extra.safetensors'], token=sys"
    told = ask(hub, script=SCRIPT.replace("token=sys", indexed))
    assert "model-extra.safetensors" in told.split()
    told = ask(hub, script=SCRIPT.replace("token=sys", indexed.replace("extra", "other")))
    assert told.startswith("FetchError the base model lacks weight files")
