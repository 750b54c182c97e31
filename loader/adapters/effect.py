"""The adapter that loads and changes nothing: found before anything is built upon it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from loader.errors import AdapterError
from loader.weights.header import TensorInfo


def check_effect(
    folder: Path, tensors: Mapping[str, TensorInfo], read_raw: Callable[[str], memoryview | bytes]
) -> None:
    """Raise AdapterError naming every adapter tensor that is empty, or all zero where it must not.

    A LoRA's B starts as zeros, so zeros there are a module that training never reached; zeros in
    biases and whole modules are values like any other.
    """
    problems = []
    for name, info in tensors.items():
        if not info.size_bytes:
            problems.append(f"{name}: empty {info.shape}")
        elif _must_differ(name) and not bytes(read_raw(name)).strip(b"\0"):
            problems.append(f"{name}: all zero")
    if not tensors:
        problems.append("no tensors at all")
    if problems:
        raise AdapterError(
            "an adapter that would change nothing",
            where=str(folder),
            problems=problems,
            expected="trained values in every tensor",
            next_step="save the adapter again, gathering sharded parameters first (ZeRO-3, FSDP)",
        )


def _must_differ(name: str) -> bool:
    return "lora_" in name or "hada_" in name or "lokr_" in name or "vera_lambda" in name
