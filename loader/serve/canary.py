"""Proof of effect: before readiness, every adapter must answer a prompt unlike its base.

The worst failure in the field is an adapter that is loaded and changes nothing: base output is
served in silence (https://github.com/vllm-project/vllm/issues/34186). What is compared are the
log-probabilities of the tokens that a model says. The base is asked twice: what its own two answers
differ by is the engine's noise, not an adapter's work.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loader.errors import AdapterError

PROMPT = "The capital of France is"
CANARY_TOKENS = 8
_ROUNDS = 3  # beside other requests an engine is noisy, and a weak adapter may need a second look
_log = logging.getLogger("podloader")


@dataclass(frozen=True, slots=True)
class Said:
    """Tokens in a row, and the log-probability of each."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]


Ask = Callable[[str], Awaitable[Said]]
"""Returns what the model of that name says to the canary prompt."""


async def check_adapters(ask: Ask, base: str, adapters: Sequence[str]) -> None:
    """Raise AdapterError naming every one of *adapters* that answers as *base* does."""
    silent = list(adapters)
    for _ in range(_ROUNDS):
        if not silent:
            return
        first, again = await ask(base), await ask(base)
        noise = distance(first, again)
        answers = {name: await ask(name) for name in silent}
        _check_numbers({base: first} | answers)
        found = {name: distance(first, answer) for name, answer in answers.items()}
        for name, change in found.items():
            _log.info("canary: %s changes log-probabilities by up to %.3g", name, change)
        silent = [name for name, change in found.items() if not change > noise]
    refuse_silent(silent, noise)


def refuse_silent(silent: Sequence[str], noise: float) -> None:
    """Raise AdapterError naming the adapters in *silent*, if any."""
    if silent:
        raise AdapterError(
            "adapters that change nothing in the engine",
            problems=silent,
            expected="other log-probabilities for the canary prompt than the base model's",
            got=f"the same, within {noise:.3g}",
            next_step="the engine did not take the adapters up: merge them (adapter_policy: "
            "merge), or set canary: false to serve them all the same",
        )


def _check_numbers(answers: Mapping[str, Said]) -> None:
    """Raise AdapterError naming those that answer with NaN, which no comparison would find."""
    if spoiled := [n for n, said in answers.items() if not all(map(math.isfinite, said.logprobs))]:
        raise AdapterError(
            "models that answer with no numbers",
            problems=spoiled,
            expected="finite log-probabilities for the canary prompt",
            got="NaN or infinity",
            next_step="a training that diverged leaves such weights: choose an earlier checkpoint, "
            "or another engine_args dtype",
        )


def distance(ours: Said, theirs: Said) -> float:
    """Return by how much the log-probabilities differ at most, up to the first other token."""
    most = 0.0
    pairs = zip(ours.tokens, theirs.tokens, ours.logprobs, theirs.logprobs, strict=False)
    for our_token, their_token, our_value, their_value in pairs:
        most = max(most, abs(our_value - their_value))
        if our_token != their_token:
            break
    return most


def canary_body(name: str) -> dict[str, Any]:
    """Return a completions body that makes vLLM tell the log-probabilities of what it says.

    Not those of the prompt: vLLM 0.32 dies of that beside other requests, once an adapter is
    loaded. The salt keeps cached blocks, whose numbers come out a little different, away.
    """
    return {
        "model": name,
        "prompt": PROMPT,
        "max_tokens": CANARY_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "cache_salt": secrets.token_hex(8),
    }


def read_said(answer: Mapping[str, Any]) -> Said:
    """Return what the answer to ``canary_body`` says."""
    found = answer["choices"][0]["logprobs"]
    values = (math.nan if value is None else value for value in found["token_logprobs"])
    return Said(tuple(found["tokens"]), tuple(map(float, values)))
