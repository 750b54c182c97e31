"""Whisper and embedding models in Truss's own server, on vLLM: what they say is what theirs say."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import APIStatusError, OpenAI
from transformers import AutoTokenizer, BertModel

from tests.origin import serving, write_listing
from tests.other_models import heard, tiny_embedder, tiny_whisper, tone
from tests.serve.truss_server import TrussServer, running_template
from tests.truss.test_truss_templates import stage_of

pytestmark = pytest.mark.engine
SENTENCES = ["the quick brown fox", "what is the capital of france ?"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "whisper": tiny_whisper(folder / "whisper"),
        "embedder": tiny_embedder(folder / "embedder"),
    }


def serve(model: Path, folder: Path) -> Iterator[TrussServer]:
    """Give the server that loaded *model* from a training job."""
    engine_args = {"enforce_eager": True, "dtype": "float32"}
    with serving(folder / "origin") as origin:
        shutil.copytree(model, origin.folder("job1") / "checkpoint-1")
        listing = write_listing(origin, folder / "listing.json", "job1")
        settings = {"PODLOADER_ENGINE_ARGS": json.dumps(engine_args)}
        settings["PODLOADER_SERVED_MODEL_NAME"] = "m"
        with running_template("vllm-model", folder, listing, settings) as server:
            yield server


@pytest.fixture(scope="module")
def embedder(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TrussServer]:
    yield from serve(models["embedder"], tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def whisper(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TrussServer]:
    yield from serve(models["whisper"], tmp_path_factory.mktemp("whisper"))


class TestEmbeddings:
    """An embedding model."""

    def test_the_openai_client_gets_what_transformers_computes(
        self, embedder: TrussServer, models: dict[str, Path]
    ) -> None:
        client = OpenAI(base_url=f"{embedder.url}/v1", api_key="none", max_retries=0)
        found = client.embeddings.create(model="m", input=SENTENCES)  # base64, the client's choice
        assert found.model == "m"
        expected = mean_pooled(models["embedder"])
        for data, vector in zip(found.data, expected, strict=True):
            torch.testing.assert_close(torch.tensor(data.embedding), vector, atol=1e-4, rtol=1e-4)

    def test_the_engine_took_the_weights_as_they_came(self, embedder: TrussServer) -> None:
        log = embedder.log.read_text()
        assert "engine start: stream" in log
        assert "files, not streamed" not in log
        download, weights = stage_of(embedder.log, "download"), stage_of(embedder.log, "weights")
        assert weights[1] >= download[1]

    def test_predict(self, embedder: TrussServer, models: dict[str, Path]) -> None:
        answer = embedder.predict({"input": SENTENCES[0]})
        assert answer.status_code == 200, answer.text
        vector = torch.tensor(answer.json()["data"][0]["embedding"])
        torch.testing.assert_close(vector, mean_pooled(models["embedder"])[0], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            ({"input": 3}, 400),
            ({"input": SENTENCES[0], "encoding_format": "bytes"}, 400),
            ({"input": SENTENCES[0], "model": "absent"}, 404),
            ({"input": "fox " * 500}, 400),
            ({"prompt": "x"}, 501),
            ({"messages": [{"role": "user", "content": "x"}]}, 501),
            ({"file": "UklGRg=="}, 501),
        ],
    )
    def test_bad_requests(self, embedder: TrussServer, body: Any, status: int) -> None:
        answer = embedder.predict(body)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]
        assert httpx.get(f"{embedder.url}/v1/models/model").status_code == 200


def mean_pooled(folder: Path) -> torch.Tensor:
    """Return the mean of the last hidden states of every sentence: (sentences, hidden)."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder)
    with torch.no_grad():
        states = [
            model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0)
            for text in SENTENCES
        ]
    return torch.stack(states)


class TestWhisper:
    """A Whisper model."""

    def test_what_transformers_hears(self, whisper: TrussServer, models: dict[str, Path]) -> None:
        body = {"file": in_base64(tone()), "language": "en", "max_completion_tokens": 12}
        answer = whisper.predict(body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["text"] == heard(models["whisper"], 12)

    def test_streamed(self, whisper: TrussServer) -> None:
        body: dict[str, Any] = {
            "file": f"data:audio/wav;base64,{in_base64(tone())}",
            "language": "en",
        }
        body |= {"max_completion_tokens": 12, "stream": True}
        url = f"{whisper.url}/v1/models/model:predict"
        with httpx.stream("POST", url, json=body, timeout=60) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert lines.pop() == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events)
        assert text == whisper.predict(body | {"stream": False}).json()["text"]

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            ({"file": "no base64!"}, 400),
            ({"file": 7}, 400),
            ({"file": base64.b64encode(b"no sound").decode()}, 400),
            ({"file": "UklGRg==", "response_format": "song"}, 400),
            ({"file": "UklGRg==", "language": "klingon"}, 400),
            ({"input": "x"}, 501),
        ],
    )
    def test_bad_requests(self, whisper: TrussServer, body: Any, status: int) -> None:
        answer = whisper.predict(body)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]

    def test_embeddings_are_not_its_work(self, whisper: TrussServer) -> None:
        client = OpenAI(base_url=f"{whisper.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(APIStatusError) as error:
            client.embeddings.create(model="m", input="x")
        assert error.value.status_code == 501


def in_base64(sound: bytes) -> str:
    return base64.b64encode(sound).decode()
