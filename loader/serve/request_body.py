"""The checks on a request body that hold for every engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loader.errors import RequestError

TEXT_PROMPTS = ("messages", "prompt")
PROMPTS = (*TEXT_PROMPTS, "input", "file")  # what tells one sort of body from another
_ASKS_FOR = {
    "messages": "chat",
    "prompt": "completions",
    "input": "embeddings",
    "file": "transcription",
}


def check_request(
    request: object,
    *,
    base: str,
    adapters: Sequence[str],
    known: Sequence[str] = TEXT_PROMPTS,
) -> dict[str, Any]:
    """Return the body with its ``model`` filled in; *known* are the sorts that the engine answers.

    A body without ``model`` gets the fine-tuned one where there is just one, so that a checkpoint
    answers alike whether its adapter was attached or merged; with several it has to choose.

    Raises:
        RequestError: 400 for a wrong body, 404 for a model that is not served.
    """
    body = check_prompt(request, known)
    body["model"] = _choose_model(body.get("model"), base, adapters)
    return body


def check_prompt(request: object, known: Sequence[str] = PROMPTS) -> dict[str, Any]:
    """Return the body as a dict that holds exactly one of *known*, such as ``messages``.

    Raises:
        RequestError: 400.
    """
    if not isinstance(request, Mapping):
        raise RequestError(
            "the request is not a JSON object",
            expected="an OpenAI body",
            got=type(request).__name__,
        )
    given = [key for key in PROMPTS if request.get(key) is not None]
    if len(given) != 1 or given[0] not in known:
        either = "either " if len(known) > 1 else ""
        raise RequestError(
            f"the request needs {either}{' or '.join(known)}",
            expected=", ".join(f"{key} ({_ASKS_FOR[key]})" for key in known),
            got=" and ".join(given) or "none of them",
        )
    return dict(request)


def _choose_model(name: object, base: str, adapters: Sequence[str]) -> str:
    names = ", ".join([*adapters, base])
    if name is None or name == "":
        if len(adapters) > 1:
            raise RequestError(
                "the request names no model and several are served",
                where="model",
                expected=f"one of {names}",
                got="none",
            )
        return adapters[0] if adapters else base
    if not isinstance(name, str):
        raise RequestError(
            "model is not a name", where="model", expected=f"one of {names}", got=repr(name)
        )
    if name != base and name not in adapters:
        raise RequestError(
            f"the model {name!r} does not exist",
            status=404,
            where="model",
            expected=f"one of {names}",
            got=name,
        )
    return name
