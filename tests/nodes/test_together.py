"""Three raylets, each with a folder and an address of its own, and the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.models import tiny_llama
from tests.nodes.cluster import SMALL, RayNodes
from tests.origin import FaultyOrigin, slow, write_listing

pytest.importorskip("ray")
pytestmark = pytest.mark.engine

TOKEN = "nobody-reads-this-token"
HUB_TOKEN = "hf_nobodyreadsthiseither"
NODES = 3


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    unshared = ["unshare", "--mount", "true"]
    if subprocess.run(unshared, capture_output=True, check=False).returncode:
        pytest.skip("this system allows no mount namespaces")
    root = tmp_path_factory.mktemp("cluster")
    folders = [root / f"node-{place}" for place in range(NODES)]
    for folder in (shared := root / "shared", *folders):
        folder.mkdir()
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temp:
        found = RayNodes(shared, folders, Path(temp))
        yield found
        found.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some chunks large: what is smaller is not shared."""
    return tiny_llama(tmp_path_factory.mktemp("model") / "m", vocab_size=100_000)


class Start:
    """A config, and commands with it."""

    def __init__(self, nodes: RayNodes, origin: FaultyOrigin, folder: Path, model: Path) -> None:
        self.nodes, self.origin, self.folder = nodes, origin, folder
        shutil.copytree(model, origin.folder() / "checkpoint-10")
        self.bytes = sum(path.stat().st_size for path in model.iterdir())
        self.listing = write_listing(origin, folder / "listing.json")

    def write_config(self, down: str, **own: object) -> Path:
        references = [{"training_job_id": "job1", "paths": ["rank-0/checkpoint-10/"]}]
        config = self.folder / "config.yaml"
        root = self.nodes.shared / down
        config.write_text(
            yaml.safe_dump(
                {
                    "training_checkpoints": {
                        "download_folder": str(root),
                        "artifact_references": references,
                    },
                    "model_metadata": {"podloader": {"artifacts": [str(self.listing)], **own}},
                }
            )
        )
        return config

    def command(self, down: str, **own: object) -> subprocess.Popen[str]:
        config = self.write_config(down, **own)
        words = ["prepare", str(config), "--ray", self.nodes.address, "--json"]
        return subprocess.Popen(
            [sys.executable, "-m", "loader", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PODLOADER_PEERS_TOKEN": TOKEN, "HF_TOKEN": HUB_TOKEN},
        )

    def run(self, down: str, **own: object) -> tuple[int, dict[str, Any], str]:
        return end_of(self.command(down, **own))

    def wait_for_weights(self, down: str) -> None:
        """Wait until every node has asked for them."""
        until = time.monotonic() + 90
        while time.monotonic() < until:
            if all(list((f / down).rglob("*safetensors*")) for f in self.nodes.folders):
                return
            time.sleep(0.05)
        raise AssertionError("the nodes did not begin")

    def assert_released(self) -> None:
        until = time.monotonic() + 20
        while (state := self.nodes.state())["living"] or state["groups"]:
            assert time.monotonic() < until, state
            time.sleep(0.5)


SERVE = """
import asyncio, json, sys
import ray
from ray.serve.llm import LLMConfig

ray.init(sys.argv[1], log_to_driver=False)
config = LLMConfig(
    model_loading_config={"model_id": "m"},
    accelerator_config={"kind": "cpu"},
    placement_group_config={"bundles": [{"CPU": 1}] * 3, "strategy": "STRICT_SPREAD"},
    callback_config={
        "callback_class": "loader.nodes.serve_llm:PrepareOnNodes",
        "callback_kwargs": {"config": sys.argv[2]},
    },
)
callback = config.get_or_create_callback()
asyncio.run(callback.run_callback("on_before_node_init"))
engine = config.get_engine_config()
found = engine.get_initialization_kwargs() | {"init": callback.ctx.run_init_node}
print(json.dumps({name: found[name] for name in ("model", "tokenizer", "init")}))
"""


def end_of(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    """Return the exit code, the document and the lines."""
    out, lines = process.communicate(timeout=240)
    assert out.count("\n") == 1, out + lines
    return process.returncode, json.loads(out), lines


@pytest.fixture
def start(nodes: RayNodes, origin: FaultyOrigin, tmp_path: Path, model: Path) -> Start:
    return Start(nodes, origin, tmp_path, model)


def test_every_node_prepares_and_the_origin_sends_one_copy(start: Start, model: Path) -> None:
    code, document, lines = start.run("all", peers="ray", peers_port=8791)
    assert code == 0, lines
    assert set(document["nodes"]) == {"127.0.0.2", "127.0.0.3", "127.0.0.4"}
    where = "job1/rank-0/checkpoint-10/model.safetensors"
    for folder in start.nodes.folders:
        assert (folder / "all" / where).read_bytes() == (model / where.split("/")[-1]).read_bytes()
    for ready in document["nodes"].values():
        assert ready["path"] == str(start.nodes.shared / "all" / where.rpartition("/")[0])
    assert not list(start.nodes.shared.iterdir()), "a node's folder is its own"
    assert start.origin.bytes_sent < 1.5 * start.bytes
    assert "127.0.0.2: fetching" in lines
    start.assert_released()
    told = json.dumps(start.nodes.state()["told"])
    logs = b"".join(p.read_bytes() for p in start.nodes.temp.rglob("*") if p.is_file())
    assert "NodePreparer" in told
    assert logs
    for secret in (TOKEN, HUB_TOKEN, "Signature="):
        assert secret not in told
        assert secret.encode() not in logs


def test_one_nodes_failure_ends_all_by_its_own_type_and_name(start: Start) -> None:
    code, document, _ = start.run(SMALL)
    assert code == 4
    assert document["error"]["error"] == "DiskError"
    assert document["error"]["what"].startswith("127.0.0.3: ")
    start.assert_released()


def test_a_config_that_is_wrong_for_all_names_one_node(start: Start) -> None:
    start.origin.put("checkpoint-10/config.json", b"no JSON")
    code, document, _ = start.run("wrong")
    assert code == 5
    assert document["error"]["what"].startswith("127.0.0.")
    start.assert_released()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_releases_all(start: Start, number: signal.Signals) -> None:
    start.origin.fail("model.safetensors", *[slow(0.5)] * 200)
    process = start.command(f"signal-{number}")
    start.wait_for_weights(f"signal-{number}")
    process.send_signal(number)
    code, document, _ = end_of(process)
    assert code == 128 + number
    assert document["error"]["error"] == "Interrupted"
    start.assert_released()


def test_ray_serve_llm_has_its_nodes_prepare(start: Start) -> None:
    config = start.write_config("served")
    done = subprocess.run(
        [sys.executable, "-c", SERVE, start.nodes.address, str(config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    path = start.nodes.shared / "served/job1/rank-0/checkpoint-10"
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"model": str(path), "tokenizer": str(path), "init": False}
    for folder in start.nodes.folders:
        assert (folder / path.relative_to(start.nodes.shared) / "model.safetensors").is_file()


def test_a_node_that_dies_is_named_and_the_rest_released(start: Start) -> None:
    """The last of this file: the node stays dead."""
    start.origin.fail("model.safetensors", *[slow(0.5)] * 200)
    process = start.command("killed", peers="ray", peers_port=8791)
    start.wait_for_weights("killed")
    start.nodes.kill("127.0.0.4")
    began = time.monotonic()
    code, document, _ = end_of(process)
    print(f"named after {time.monotonic() - began:.1f} s")  # noqa: T201
    assert (code, document["error"]["error"]) == (7, "NodeError")
    assert document["error"]["what"].startswith("127.0.0.4: ")
    start.assert_released()
