"""Proof of effect: before readiness, every adapter must answer a prompt unlike its base.

The worst failure in the field is an adapter that is loaded and changes nothing: base output is
served in silence (https://github.com/vllm-project/vllm/issues/34186). What is compared are the
log-probabilities that a model gives to each token of one prompt. The base is asked twice: what its
own two answers differ by is the engine's noise, not an adapter's work.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from loader.errors import AdapterError

PROMPT = "The capital of France is Paris, and 12 + 30 = 42."
_log = logging.getLogger("podloader")

Ask = Callable[[str], Awaitable[Sequence[float]]]
"""Returns the log-probabilities of the prompt's tokens, given by the model of that name."""


async def check_adapters(ask: Ask, base: str, adapters: Sequence[str]) -> None:
    """Raise AdapterError naming every one of *adapters* that answers as *base* does."""
    if not adapters:
        return
    first, again = await ask(base), await ask(base)
    noise = distance(first, again)
    found = {name: distance(first, await ask(name)) for name in adapters}
    for name, change in found.items():
        _log.info("canary: %s moves the base's log-probabilities by up to %.3g", name, change)
    refuse_silent(found, noise)


def refuse_silent(found: Mapping[str, float], noise: float) -> None:
    """Raise AdapterError naming every adapter whose change in *found* is not above *noise*."""
    if silent := [name for name, change in found.items() if not change > noise]:
        raise AdapterError(
            "adapters that change nothing in the engine",
            problems=silent,
            expected="other log-probabilities for the canary prompt than the base model's",
            got=f"the same, within {noise:.3g}",
            next_step="the engine did not take the adapters up: merge them (adapter_policy: "
            "merge), or set canary: false to serve them all the same",
        )


def distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return by how much two rows of log-probabilities differ at most."""
    return max((abs(a - b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def canary_body(name: str) -> dict[str, Any]:
    """Return a completions body that makes vLLM tell its log-probabilities of the prompt."""
    return {
        "model": name,
        "prompt": PROMPT,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,
    }


def read_logprobs(answer: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the log-probabilities in the answer to ``canary_body``; the first token has none."""
    tokens = answer["choices"][0]["prompt_logprobs"]
    return tuple(float(entry["logprob"]) for token in tokens if token for entry in token.values())
