"""Completions in OpenAI's shapes: chat or text, whole or as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loader.serve.generation import Completion

DONE = "data: [DONE]\n\n"


def _new_id() -> str:
    return uuid.uuid4().hex[:16]


@dataclass(frozen=True, slots=True)
class Answer:
    """What is common to all parts of one answer."""

    model: str
    chat: bool
    key: str = field(default_factory=_new_id)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the answer as one object, a choice for each prompt."""
        choices = [
            self._choice(index, self._content(done.text), done.finish_reason)
            for index, done in enumerate(completions)
        ]
        return self._object("", choices) | {"usage": usage(completions)}

    def opening(self, index: int) -> str | None:
        """Return the event that names the speaker, which only a chat has."""
        if not self.chat:
            return None
        return self._event([self._choice(index, {"delta": {"role": "assistant", "content": ""}})])

    def piece(self, index: int, text: str) -> str:
        """Return the event of some more text."""
        content = {"delta": {"content": text}} if self.chat else {"text": text}
        return self._event([self._choice(index, content)])

    def closing(self, index: int, finish_reason: str) -> str:
        """Return the event that ends one choice."""
        content: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._event([self._choice(index, content, finish_reason)])

    def accounts(self, completions: Sequence[Completion]) -> str:
        """Return the event that ``stream_options.include_usage`` asks for."""
        return self._event([], usage=usage(completions))

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}

    def _choice(
        self, index: int, content: dict[str, Any], finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}

    def _object(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.key}",
            "object": f"chat.completion{suffix}" if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps(self._object('.chunk', choices) | more)}\n\n"


def failure(message: str) -> str:
    """Return the event of an error after the stream has begun, as vLLM writes it."""
    error = {"message": message, "type": "InternalServerError", "param": None, "code": 500}
    return f"data: {json.dumps({'error': error})}\n\n"


def usage(completions: Sequence[Completion]) -> dict[str, int]:
    """Return OpenAI's token counts over all prompts."""
    asked = sum(done.prompt_tokens for done in completions)
    answered = sum(done.completion_tokens for done in completions)
    return {
        "prompt_tokens": asked,
        "completion_tokens": answered,
        "total_tokens": asked + answered,
    }
