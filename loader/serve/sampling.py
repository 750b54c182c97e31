"""The sampling parameters of an OpenAI body, for the engine that has no parser of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from loader.errors import RequestError

_NOT_SAMPLING = {"model", "messages", "prompt", "user", "metadata", "store"}
_GREEDY_BELOW = 1e-5  # vLLM's own limit


class StreamOptions(BaseModel):
    """OpenAI's ``stream_options``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: bool = False


class Sampling(BaseModel):
    """What one request asks for; None where it leaves the choice to the model's own defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    def with_defaults(self, defaults: Mapping[str, Any]) -> Sampling:
        """Return these parameters with the model's own where the request has none."""
        missing = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        return self.model_copy(update=missing)

    def generation_kwargs(self) -> dict[str, Any]:
        """Return them as transformers' ``GenerationConfig`` names them."""
        kwargs: dict[str, Any] = {}
        if self.repetition_penalty is not None:
            kwargs["repetition_penalty"] = self.repetition_penalty
        temperature = 1.0 if self.temperature is None else self.temperature
        if temperature < _GREEDY_BELOW:
            return kwargs | {"do_sample": False}
        kwargs |= {"do_sample": True, "temperature": temperature, "top_k": max(self.top_k or 0, 0)}
        if self.top_p is not None:
            kwargs["top_p"] = self.top_p
        if self.min_p is not None:
            kwargs["min_p"] = self.min_p
        return kwargs


def read_sampling(body: Mapping[str, Any]) -> Sampling:
    """Return the sampling parameters of *body*.

    Parameters that this engine lacks are refused unless they are left at nothing: an answer that
    silently ignores ``tools`` or ``logprobs`` is a wrong one.

    Raises:
        RequestError: 400, naming every field that is wrong.
    """
    fields = {k: v for k, v in body.items() if k not in _NOT_SAMPLING and v is not None}
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    known = Sampling.model_fields.keys()
    foreign = sorted(k for k, v in fields.items() if k not in known and not _is_neutral(k, v))
    if foreign:
        raise RequestError(
            f"parameters that the transformers engine does not have: {', '.join(foreign)}",
            expected=", ".join(known),
            next_step="leave them out, or set engine: vllm",
        )
    try:
        return Sampling(**{k: v for k, v in fields.items() if k in known})
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
    raise RequestError("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in found))


def _is_neutral(key: str, value: object) -> bool:
    return not value or (key in ("n", "best_of") and value == 1)
