"""One prompt through transformers' ``generate``, watched token by token."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loader.serve.sampling import Sampling

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # a character whose other bytes are still to come


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A transformers or PEFT model, its tokenizer, and what its configs say about generating.

    ``defaults`` are the model's own sampling parameters, ``max_len`` its context in tokens.
    """

    model: Any
    tokenizer: Any
    defaults: dict[str, Any]
    max_len: int
    eos: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """The text that followed a prompt; ``finish_reason`` is ``stop`` or ``length``."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def generate(
    loaded: LoadedModel,
    prompt: Sequence[int],
    sampling: Sampling,
    adapter: str | None,
    emit: Callable[[str], None],
    cancelled: threading.Event,
) -> Completion:
    """Return what the model says after *prompt*, whose token ids these are.

    ``adapter`` is a PEFT adapter's name, None the base model. ``emit`` gets the text piece by piece
    once no stop string can reach back into it. Not to be called twice at the same time.
    """
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    eos = () if sampling.ignore_eos else loaded.eos
    config = GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        eos_token_id=list(eos) or None,
        pad_token_id=eos[0] if eos else 0,
        **sampling.generation_kwargs(),
    )
    watch = _Watch(loaded.tokenizer, len(prompt), sampling.stop, emit, cancelled)
    ids = torch.tensor([list(prompt)], device=loaded.model.device)
    with torch.inference_mode(), _adapter(loaded.model, adapter), torch.random.fork_rng():
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        output = loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
    new = output[0, len(prompt) :].tolist()
    ended = watch.stopped or (bool(new) and new[-1] in eos)
    return Completion(watch.finish(), "stop" if ended else "length", len(prompt), len(new))


def prompt_logprobs(
    loaded: LoadedModel, prompt: Sequence[int], adapter: str | None
) -> tuple[float, ...]:
    """Return the log-probability of each token of *prompt* but the first."""
    import torch

    ids = torch.tensor([list(prompt)], device=loaded.model.device)
    with torch.inference_mode(), _adapter(loaded.model, adapter):
        logits = loaded.model(input_ids=ids).logits[0, :-1].float()
    found = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])
    return tuple(found.flatten().tolist())


@contextlib.contextmanager
def _adapter(model: Any, name: str | None) -> Any:
    if name is not None:
        model.set_adapter(name)
        yield
    elif hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    else:
        yield


class _Watch:
    """A stopping criterion that reads along: finds stop strings, hands on what is settled."""

    def __init__(
        self,
        tokenizer: Any,
        prompt_tokens: int,
        stop: Sequence[str],
        emit: Callable[[str], None],
        cancelled: threading.Event,
    ) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._prompt_tokens = prompt_tokens
        self._stop = stop
        self._emit = emit
        self._cancelled = cancelled
        self._text = ""
        self._emitted = 0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        new = input_ids[0, self._prompt_tokens :]
        self._text = self._tokenizer.decode(new, skip_special_tokens=True)
        places = [place for stop in self._stop if (place := self._text.find(stop)) >= 0]
        if places:
            self._text, self.stopped = self._text[: min(places)], True
        self._hand_on(len(self._text) if self.stopped else self._settled())
        end = self.stopped or self._cancelled.is_set()
        return torch.full((1,), end, device=input_ids.device, dtype=torch.bool)

    def finish(self) -> str:
        """Hand on the rest and return the whole text."""
        self._hand_on(len(self._text))
        return self._text

    def _settled(self) -> int:
        """Return how much of the text neither a stop string nor a next byte can change."""
        whole = len(self._text.rstrip(_UNFINISHED))
        held = max((len(stop) for stop in self._stop), default=1) - 1
        return min(whole, len(self._text) - held)

    def _hand_on(self, end: int) -> None:
        if end > self._emitted:
            self._emit(self._text[self._emitted : end])
            self._emitted = end
