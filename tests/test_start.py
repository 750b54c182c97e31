"""What a command has loaded when its first request leaves: the request waits for all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.origin import FaultyOrigin, write_listing

# An audit hook sees the real connection being made, wherever that is.
_RUN = """
import sys

def tell(event, _):
    if event == "socket.connect":
        print(*sys.modules, flush=True)
        raise SystemExit

from loader.cli import main
sys.addaudithook(tell)
main()
"""
_LATE = {
    "asyncio",
    "awscrt",
    "boto3",
    "botocore",
    "click",
    "difflib",
    "email",
    "fsspec",
    "http.client",
    "huggingface_hub",
    "importlib.metadata",
    "numpy",
    "opentelemetry",
    "prometheus_client",
    "pydantic",
    "rich",
    "safetensors",
    "torch",
    "transformers",
    "vllm",
    "loader.adapters",
    "loader.prepare.ready",
    "loader.serve",
    "loader.weights.inspect",
}


@pytest.mark.parametrize("command", ["fetch", "plan", "prepare"])
def test_the_first_request_waits_for_nothing_that_is_needed_later(
    origin: FaultyOrigin, tmp_path: Path, command: str
) -> None:
    origin.put("checkpoint-10/config.json", b"{}")
    listing = write_listing(origin, tmp_path / "listing.json")
    references = [{"training_job_id": "job1", "paths": ["rank-0/"]}]
    config = {
        "training_checkpoints": {
            "download_folder": str(tmp_path / "down"),
            "artifact_references": references,
        },
        "model_metadata": {"podloader": {"artifacts": [str(listing)]}},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    arguments = [sys.executable, "-c", _RUN, command, str(path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
    loaded = set(done.stdout.split())
    assert "loader.http.client" in loaded, done.stderr
    # These decide what is fetched, and of what versions a made model tells.
    own = {"loader.adapters", "loader.prepare.ready", "loader.serve", "loader.weights.inspect"}
    own |= {"importlib.metadata", "email"}
    early = loaded & (_LATE - own if command == "prepare" else _LATE)
    assert not early, sorted(early)
