"""The whole way of a Whisper: ``truss init``, the container that the Truss asks for, a client."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI

from tests.images import build_image
from tests.origin import Fault, serving, slow, write_listing
from tests.other_models import heard, tiny_whisper, tone
from tests.pod.containers import start_container
from tests.pod.pods import RunningPod, free_port, needs_namespaces

pytestmark = pytest.mark.engine
_SECRET = "hf_hush"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_whisper(tmp_path_factory.mktemp("models") / "whisper")


@pytest.fixture(scope="module")
def container(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPod]:
    """A container, ready."""
    with contained(model, tmp_path_factory.mktemp("container")) as running:
        running.wait_ready()
        yield running


@contextlib.contextmanager
def contained(model: Path, folder: Path, *ways: Fault) -> Iterator[RunningPod]:
    """Give the container of what ``truss init`` makes for *model*, whose weights come *ways*."""
    needs_namespaces()
    with serving(folder / "origin") as origin:
        shutil.copytree(model, origin.folder("job1") / "checkpoint-1")
        listing = write_listing(origin, folder / "listing.json", "job1")
        init(listing, folder / "truss")
        edit(folder / "truss/config.yaml", folder / "down")
        origin.fail("model.safetensors", *ways)
        image = build_image(folder / "truss", folder / "image")
        running = start_container(image, folder, {"hf_access_token": _SECRET}, {})
        try:
            yield running
        finally:
            running.close()


def init(listing: Path, output: Path) -> None:
    """Run ``podloader truss init``."""
    command = [sys.executable, "-m", "loader", "truss", "init", "--artifacts", str(listing)]
    command += ["--output", str(output), "--name", "hearing", "--non-interactive"]
    command += ["--env", "VLLM_CPU_KVCACHE_SPACE=1", "--secret", "HF_TOKEN=hf_access_token"]
    subprocess.run(command, check=True, capture_output=True)


def edit(config: Path, download_folder: Path) -> None:
    """Change what this machine has otherwise: a free port, a folder, a dtype to compare with."""
    text = config.read_text()
    for old, new in (
        ("8000", str(free_port())),
        ("/tmp/training_checkpoints", str(download_folder)),
        ("dtype: bfloat16", "dtype: float32"),
    ):
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)


@pytest.fixture
def client(container: RunningPod) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{container.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_sigterm_ends_a_start(model: Path, tmp_path: Path) -> None:
    with contained(model, tmp_path, *[slow(0.5)] * 9) as running:
        running.wait_for(lambda body: body["bytes"]["done"] < body["bytes"]["total"])
        family = [running.pod, *running.pod.children(recursive=True)]
        running.stop_probing()
        running.signal(signal.SIGTERM)
        assert running.wait(10) == 128 + signal.SIGTERM
        assert not [process for process in family if process.is_running()]


def test_podloader_is_the_first_process(container: RunningPod) -> None:
    _, program, command, *_ = container.pod.cmdline()  # the first is Python
    assert (Path(program).name, command) == ("podloader", "serve")
    status = Path(f"/proc/{container.pod.pid}/status").read_text().splitlines()
    (pids,) = [line.split() for line in status if line.startswith("NSpid:")]
    assert pids[-1] == "1"


def test_the_secret_is_in_its_variable_and_in_no_log(container: RunningPod) -> None:
    assert container.pod.environ()["HF_TOKEN"] == _SECRET
    assert _SECRET not in container.text()


def test_what_transformers_hears(client: OpenAI, model: Path) -> None:
    sound = ("tone.wav", tone())
    answer = client.audio.transcriptions.create(
        model="hearing", file=sound, language="en", extra_body={"max_completion_tokens": 12}
    )
    assert answer.text == heard(model, 12)
    assert [served.id for served in client.models.list()] == ["hearing"]


def test_what_is_no_sound_is_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError):
        client.audio.transcriptions.create(model="hearing", file=("tone.wav", b"no sound"))


def test_sigint_ends_it_well(container: RunningPod) -> None:
    """The last of this container."""
    family = [container.pod, *container.pod.children(recursive=True)]
    container.stop_probing()
    container.signal(signal.SIGINT)
    assert container.wait(40) == 0
    assert not [process for process in family if process.is_running()]
