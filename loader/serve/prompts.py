"""The prompts of an OpenAI body as token ids, made as vLLM makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loader.errors import RequestError


def encode_prompts(tokenizer: Any, body: Mapping[str, Any]) -> list[list[int]]:
    """Return the token ids of each prompt: one for a chat, one or several for completions.

    Raises:
        RequestError: 400 where there is no prompt in it, or no chat template for it.
    """
    if body.get("messages") is not None:
        return [_encode_chat(tokenizer, body["messages"])]
    prompt = body["prompt"]
    several = isinstance(prompt, list) and not all(_is_token(item) for item in prompt)
    return [_encode(tokenizer, one) for one in (prompt if several else [prompt])]


def _encode(tokenizer: Any, prompt: object) -> list[int]:
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
    elif isinstance(prompt, list) and prompt and all(_is_token(item) for item in prompt):
        ids = prompt
        if outside := [item for item in ids if not 0 <= item < len(tokenizer)]:
            raise RequestError(f"token id {outside[0]} is out of vocabulary", where="prompt")
    else:
        raise RequestError(
            "prompt is neither text nor token ids",
            where="prompt",
            expected="a string, a list of token ids, or a list of either",
            got=type(prompt).__name__,
        )
    if not ids:
        raise RequestError("the prompt is empty", where="prompt")
    return ids


def _encode_chat(tokenizer: Any, messages: object) -> list[int]:
    import jinja2

    if not isinstance(messages, list) or not messages:
        raise RequestError(
            "messages is not a list with something in it",
            where="messages",
            expected="a list of role and content",
            got="an empty list" if messages == [] else type(messages).__name__,
        )
    if not tokenizer.chat_template:
        raise RequestError(
            "the model has no chat template",
            where="messages",
            next_step="send prompt instead, or put a chat_template.jinja beside the tokenizer",
        )
    flat = [_flatten(i, message) for i, message in enumerate(messages)]
    try:
        text = tokenizer.apply_chat_template(flat, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise RequestError(f"the chat template refuses this: {error}", where="messages") from None
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _flatten(i: int, message: object) -> dict[str, Any]:
    """Return a message whose content is one text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError("a message without a role", where=f"messages[{i}]")
    content = message.get("content")
    if isinstance(content, list):
        texts = [p.get("text") if isinstance(p, Mapping) else None for p in content]
        if not all(isinstance(text, str) for text in texts):
            raise RequestError("only parts of type text are known", where=f"messages[{i}].content")
        content = "\n".join(map(str, texts))
    if not isinstance(content, str):
        raise RequestError(
            "content is no text",
            where=f"messages[{i}].content",
            expected="a string, or a list of parts of type text",
            got=type(content).__name__,
        )
    return {**message, "content": content}


def _is_token(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)
