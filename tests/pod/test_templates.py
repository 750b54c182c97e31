"""The templates with a container of their own, from Truss's build context to a client."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from openai import OpenAI

from tests.images import build_image, lay_out
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import serving, write_listing
from tests.other_models import heard, tiny_whisper, tone
from tests.planted import module_names, plant, planted_and_run
from tests.pod.containers import start_container
from tests.pod.pods import ENGINE_ARGS, free_port, needs_namespaces

pytestmark = pytest.mark.engine


@contextmanager
def started(
    template: str, checkpoint: Path, folder: Path, settings: Mapping[str, str]
) -> Iterator[OpenAI]:
    """Give a client of *template*'s container, under Truss's supervisor, for one checkpoint."""
    needs_namespaces()
    truss, port = lay_out(template, folder / "truss"), free_port()
    text = (truss / "config.yaml").read_text()
    for old, new in (
        ("8000", str(port)),
        ("/tmp/training_checkpoints", str(folder / "down")),
        ("JOB_ID", "job1"),
        ("checkpoint-100", "checkpoint-1"),
    ):
        assert old in text
        text = text.replace(old, new)
    (truss / "config.yaml").write_text(text)
    with serving(folder / "origin") as origin:
        shutil.copytree(checkpoint, origin.folder("job1") / "checkpoint-1")
        write_listing(origin, truss / "data" / "checkpoints.json", "job1")
        image = build_image(truss, folder / "image")
        plant(image.app, module_names())
        secrets = {"hf_access_token": "hf_hush", "baseten_api_key": "hush"}
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **settings}
        running = start_container(image, folder, secrets, environment, supervised=True)
        try:
            running.wait_ready()
            with OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
                yield client
            assert "hush" not in running.text()
            assert planted_and_run(image.app) == []
        finally:
            running.close()


def test_vllm_server(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    lora = train_or_draw_lora(base, tmp_path / "lora", seed=1, spread=0.3)
    settings = {
        "PODLOADER_BASE_MODEL": str(base),
        "PODLOADER_ENGINE_ARGS": json.dumps(ENGINE_ARGS),
    }
    with started("vllm-server", lora, tmp_path, settings) as client:
        texts = {}
        for name in ("fine-tuned-model", "job1"):  # the base, and its adapter
            answer = client.completions.create(
                model=name, prompt="the capital of france", max_tokens=8, temperature=0
            )
            stream = client.completions.create(
                model=name, prompt="the capital of france", max_tokens=8, temperature=0, stream=True
            )
            texts[name] = answer.choices[0].text
            assert "".join(event.choices[0].text for event in stream) == texts[name]
        assert texts["fine-tuned-model"] != texts["job1"]
        chat = client.chat.completions.create(
            model="job1", messages=[{"role": "user", "content": "hi"}], max_tokens=3
        )
        assert chat.choices[0].message.role == "assistant"


def test_whisper(tmp_path: Path) -> None:
    model = tiny_whisper(tmp_path / "whisper")
    settings = {"PODLOADER_ENGINE_ARGS": json.dumps({"dtype": "float32", "enforce_eager": True})}
    with started("whisper", model, tmp_path, settings) as client:
        answer = client.audio.transcriptions.create(
            model="fine-tuned-whisper",
            file=("tone.wav", tone()),
            language="en",
            extra_body={"max_completion_tokens": 12},
        )
        assert answer.text == heard(model, 12)
