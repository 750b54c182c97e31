"""``TrussModel.load`` again: after a failed start, and after the engine has died."""

from __future__ import annotations

import gc
import json
import logging
import signal
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import psutil
import pytest

from loader import TrussModel
from loader.errors import FetchError, ListingError
from loader.serve.vllm.streaming import READY_TIMEOUT
from loader.types import STREAM_VARIABLE
from tests.models import tiny_llama
from tests.origin import FaultyOrigin, status, write_listing
from tests.pod.test_streamed_origin import Gate

_BODY = {"model": "job1", "prompt": "the quick", "max_tokens": 4, "temperature": 0}


def config(origin: FaultyOrigin, folder: Path, **settings: Any) -> dict[str, Any]:
    tiny_llama(origin.folder("job1") / "checkpoint-1")
    references = [{"training_job_id": "job1", "paths": ["rank-0/"]}]
    own = {"artifacts": [str(folder / "job1.json")], "served_model_name": "job1"}
    return {
        "training_checkpoints": {
            "download_folder": str(folder / "models"),
            "artifact_references": references,
        },
        "model_metadata": {"podloader": own | settings},
    }


def text_of(answer: Any) -> str:
    assert answer.status_code == 200
    return str(json.loads(answer.body)["choices"][0]["text"])


async def test_a_failed_try_is_logged_whole_and_the_next_one_serves(
    origin: FaultyOrigin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = TrussModel(config(origin, tmp_path, engine="transformers"))
    with caplog.at_level(logging.INFO), pytest.raises(ListingError) as error:
        model.load()
    assert str(error.value) in caplog.text
    assert "\n" in str(error.value)
    assert not model.is_healthy()
    write_listing(origin, tmp_path / "job1.json", "job1")
    model.load()
    assert model.is_healthy()
    assert (await model.predict(_BODY)).status_code == 200
    served: Any = model._model
    model.load()
    assert served is not None
    assert id(model._model) == id(served)
    served.close()


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning")  # a start that fails: vLLM's
async def test_an_engine_whose_weights_failed_and_one_that_died_are_started_anew(
    origin: FaultyOrigin,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In this process: the first has some of its weights, the third takes them from files."""
    for name in (READY_TIMEOUT, STREAM_VARIABLE):
        monkeypatch.setenv(name, "")  # so that it is put back
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    engine_args = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    model = TrussModel(config(origin, tmp_path, engine_args=engine_args))
    write_listing(origin, tmp_path / "job1.json", "job1")
    before = {child.pid for child in active_children()}
    gate = Gate()
    gate.then = status(404)
    gate.open.set()
    origin.fail("model.safetensors", *[gate] * 500)
    with caplog.at_level(logging.INFO):
        with pytest.raises(FetchError):
            model.load()
        assert not [c for c in active_children() if c.name == "EngineCore" and c.pid not in before]
        origin.faults.clear()
        model.load()
    assert caplog.text.count("engine start: stream") == 2
    (link,) = (tmp_path / "models").rglob(".engine-0/model")
    assert link.resolve() == tmp_path / "models/job1/rank-0/checkpoint-1"
    first = await model.predict(_BODY)
    (core,) = (c for c in active_children() if c.name == "EngineCore" and c.pid not in before)
    assert core.pid
    psutil.Process(core.pid).send_signal(signal.SIGKILL)
    for _ in range(300):
        if not model.is_healthy():
            break
        time.sleep(0.1)
    assert not model.is_healthy()
    with caplog.at_level(logging.INFO):
        model.load()
    assert "engine start: files: all of them are here" in caplog.text
    assert model.is_healthy()
    assert text_of(await model.predict(_BODY)) == text_of(first)
    served: Any = model._model
    served.close()
    caplog.clear()  # which holds errors, and these hold what failed
    gc.collect()
