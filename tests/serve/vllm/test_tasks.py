"""What is checked of embeddings and transcriptions before vLLM sees them."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loader.errors import EngineError, RequestError
from loader.serve.vllm.tasks import check_sound, embed, read_sound, transcribe

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
