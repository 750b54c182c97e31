"""The Dockerfile's steps, done; then its container: another user, a read-only root, PID 1."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from openai import OpenAI

from loader.scaffold.wheel import REQUIREMENTS
from loader.serve.vllm.releases import IMAGE
from tests.deploy.image import DOCKERFILE, Image, run
from tests.models import tiny_llama
from tests.origin import serving, write_listing
from tests.pod.pods import AS_PID_1, ENGINE_ARGS, RunningPod, free_port


def test_it_is_built_on_the_newest_engine_that_is_proved() -> None:
    assert f"\nARG IMAGE={IMAGE}\nFROM ${{IMAGE}}\n" in DOCKERFILE.read_text()


def test_what_it_installs_is_what_was_tested() -> None:
    asked = {word for word in DOCKERFILE.read_text().split() if "==" in word}
    assert asked <= set((DOCKERFILE.parents[1] / ".ci/constraints.txt").read_text().split())
    assert set(REQUIREMENTS) <= asked


def test_the_image_runs_the_wheel_as_nobody_in_particular(image: Image, cache: Path) -> None:
    script = (
        "id -u; whoami; touch /x /app/x; touch /cache/x /tmp/x && echo ok; command -v podloader"
    )
    done = run(image, cache, "sh", "-c", script)
    uid, written, program = done.stdout.split()
    assert (uid, written, program) == ("10001", "ok", "/opt/python/bin/podloader")
    assert "cannot find name for user ID 10001" in done.stderr
    assert done.stderr.count("Read-only file system") == 2
    where = run(image, cache, "python3", "-c", "import loader; print(loader.__file__)")
    assert where.stdout.startswith("/opt/python/lib/"), where.stderr


def test_what_it_is_started_with(image: Image, cache: Path) -> None:
    """The entrypoint and its arguments as they stand there: a config is all that is missing."""
    command = image.command(cache=cache)
    done = subprocess.run(
        [*AS_PID_1, *command], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2, done.stderr
    *_, line = [json.loads(line) for line in done.stderr.splitlines()]
    assert line["level"] == "ERROR"
    assert "/app/config.yaml" in line["message"]


def test_env_names_no_secret(image: Image, cache: Path) -> None:
    done = run(image, cache, "podloader", "env", "--json", HF_TOKEN="hf_hush")
    assert done.returncode == 0, done.stderr
    assert "hush" not in done.stdout


@pytest.mark.engine
def test_a_container_serves_and_drains(image: Image, cache: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "origin") as origin:
        tiny_llama(origin.folder("job1") / "model")
        listing = write_listing(origin, Path(f"{image.root}/app/listing.json"), "job1")
        document = yaml.safe_load((DOCKERFILE.parent / "config.yaml").read_text())
        references = [{"training_job_id": "job1", "paths": ["rank-0/model/"]}]
        document["training_checkpoints"]["artifact_references"] = references
        document["model_metadata"]["podloader"] = {
            "artifacts": [listing.name],
            "engine_args": ENGINE_ARGS,
            "served_model_name": "tuned",
        }
        Path(f"{image.root}/app/config.yaml").write_text(yaml.safe_dump(document))
        port = free_port()
        arguments = ["/app/config.yaml", "--", "--port", str(port)]
        command = image.command(*arguments, cache=cache, variables={"VLLM_CPU_KVCACHE_SPACE": "1"})
        pod = RunningPod(command, tmp_path, port)
        try:
            pod.wait_ready()
            assert pod.pod.uids().effective == 10001
            with OpenAI(base_url=f"{pod.url}/v1", api_key="none", max_retries=0) as client:
                answer = client.completions.create(model="tuned", prompt="hi", max_tokens=3)
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 3
            assert (cache / "training_checkpoints/job1/rank-0/model/config.json").is_file()
            pod.signal(signal.SIGTERM)
            assert pod.wait(60) == 0
        finally:
            pod.close()
