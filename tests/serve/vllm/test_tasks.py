"""What is checked of embeddings and transcriptions before vLLM sees them."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loader.adapters.merge import WeightedAdapter, merge
from loader.errors import EngineError, RequestError
from loader.serve.vllm.inprocess import VLLMModel
from loader.serve.vllm.tasks import check_sound, embed, read_sound, transcribe
from tests.other_models import draw_whisper_lora, heard, tiny_whisper, tone

SOUND = b"RIFF\x00\xff"


@pytest.mark.parametrize(
    "file",
    [
        SOUND,
        base64.b64encode(SOUND).decode(),
        f"data:audio/wav;base64,{base64.b64encode(SOUND).decode()}",
    ],
)
def test_a_sound_file_in_its_forms(file: object) -> None:
    assert read_sound(file) == SOUND


@pytest.mark.parametrize("file", ["no base64!", "UklGR", 7, ["UklGRg=="]])
def test_what_is_no_sound_file(file: object) -> None:
    with pytest.raises(RequestError, match="no sound file") as error:
        read_sound(file)
    assert error.value.status == 400
    assert error.value.where == "file"


@pytest.mark.engine
@pytest.mark.parametrize(("task", "body"), [(embed, {"input": "x"}), (transcribe, {"file": "x"})])
async def test_a_model_that_only_writes(task: Any, body: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="does not") as error:
        await task(SimpleNamespace(), body)
    assert error.value.status == 501


def test_whisper_without_a_reader_of_sound_is_refused_before_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "whisper"}')
    check_sound(tmp_path)
    monkeypatch.setattr("loader.serve.vllm.tasks.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="sound") as error:
        check_sound(tmp_path)
    assert "install av, scipy, soundfile" in error.value.next_step
    config.write_text('{"model_type": "llama"}')
    check_sound(tmp_path)
    config.unlink()
    check_sound(tmp_path)


@pytest.mark.engine
async def test_whisper_with_an_adapter_merged_in(small_cache: None, tmp_path: Path) -> None:
    """What transformers hears with the merged model, and the base does not."""
    base = tiny_whisper(tmp_path / "whisper")
    adapter = draw_whisper_lora(base, tmp_path / "adapter")
    ready = merge(base, [WeightedAdapter(adapter)], tmp_path / "merged")
    arguments = {"dtype": "float32", "enforce_eager": True}
    model = VLLMModel(ready, engine_args=arguments, served_model_name="m")
    await asyncio.to_thread(model.load)
    body = {"model": "m", "file": tone(), "language": "en", "max_completion_tokens": 12}
    answer: Any = await model.predict(body | {"temperature": 0})
    await asyncio.to_thread(model.close)
    # vLLM leaves a character that the last token cuts out, transformers shows what there is of it.
    cut = "\N{REPLACEMENT CHARACTER}"
    wanted = [heard(folder, 12).rstrip(cut) for folder in (ready.path, base)]
    assert answer["text"] == wanted[0] != wanted[1]
