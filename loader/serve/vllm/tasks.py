"""Bodies that ask for no written answer: embeddings and transcriptions, by vLLM's own handlers."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loader.errors import EngineError, FormatError, RequestError
from loader.json_text import parse_json
from loader.weights.inspect import read_json

_READS_SOUND = ("soundfile", "av")  # vLLM takes the first that it can import
_GRANULARITIES = "timestamp_granularities"


async def embed(state: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the embeddings of ``input``, in OpenAI's shape.

    Raises:
        RequestError: the model makes none, or they are asked for as raw bytes.
        ValidationError: pydantic's, for a malformed body.
    """
    from pydantic import TypeAdapter

    from loader.serve.vllm.private import EmbeddingRequest

    handler = getattr(state, "serving_embedding", None)
    if handler is None:
        raise RequestError("the model does not make embeddings", status=501)
    request = TypeAdapter(EmbeddingRequest).validate_python(dict(body))
    response = await handler(request)
    if not hasattr(response, "body"):
        raise RequestError(
            "embeddings come as JSON here", where="encoding_format", expected="float or base64"
        )
    answer: dict[str, Any] = parse_json(response.body)
    return answer


async def transcribe(state: Any, body: Mapping[str, Any]) -> Any:
    """Return vLLM's answer to a transcription: a model, an error, or a stream of events.

    ``file`` is the sound file itself, as bytes or in base64 (a ``data:`` URL is read, too); the
    other fields are those of OpenAI's ``/v1/audio/transcriptions``.

    Raises:
        RequestError: the model does not hear, or ``file`` is no base64.
        ValidationError: pydantic's, for a malformed body.
    """
    from fastapi import UploadFile

    from loader.serve.vllm.private import TranscriptionRequest, read_upload_with_limit

    handler = getattr(state, "openai_serving_transcription", None)
    if handler is None:
        raise RequestError("the model does not transcribe", status=501)
    fields = dict(body)
    if _GRANULARITIES in fields:
        fields[f"{_GRANULARITIES}[]"] = fields.pop(_GRANULARITIES)  # its name in OpenAI's form
    sound = read_sound(fields.pop("file"))
    upload = UploadFile(io.BytesIO(sound), size=len(sound), filename="sound")
    request = TranscriptionRequest(file=upload, **fields)
    return await handler.create_transcription(await read_upload_with_limit(upload), request)


def check_sound(model: Path) -> None:
    """Raise EngineError where *model* is a Whisper and nothing here could read a sound file.

    vLLM would start, and call every sound file invalid.
    """
    try:
        whisper = read_json(model / "config.json").get("model_type") == "whisper"
    except FormatError:
        return  # the engine says more about it
    if whisper and not any(map(find_spec, _READS_SOUND)):
        raise EngineError(
            "vLLM cannot read sound files here",
            where=str(model),
            expected=f"one of the packages {', '.join(_READS_SOUND)}",
            got="neither",
            next_step="install av, scipy, soundfile and soxr",
        )


def read_sound(file: object) -> bytes:
    """Return the sound file that a request's ``file`` holds.

    Raises:
        RequestError: 400 where it is neither bytes nor base64.
    """
    if isinstance(file, bytes):
        return file
    if isinstance(file, str):
        text = file.partition(",")[2] if file.startswith("data:") else file
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            pass
    raise RequestError(
        "file holds no sound file",
        where="file",
        expected="a sound file in base64",
        got="other text" if isinstance(file, str) else type(file).__name__,
    )
