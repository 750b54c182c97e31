"""The config.yaml that ``truss train deploy_checkpoints`` wrote -> what its author asked for.

Its start command runs ``vllm serve`` on paths below the download folder, in a variable or in
``docker_server``::

    sh -c "HF_TOKEN=$(cat /secrets/hf_access_token) vllm serve BASE --port 8000 --enable-lora
    --max-lora-rank 16 --lora-modules job1=/tmp/training_checkpoints/job1/rank-0/checkpoint-1"
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from loader.config.truss_config import mapping_at, read_config, training_checkpoints
from loader.errors import ConfigError
from loader.scaffold.deployment import Secret, Wishes

_COMMAND = "BT_DOCKER_SERVER_START_CMD"  # the variable that such a config keeps its command in
_LEFT = (_COMMAND, "VLLM_USE_V1")  # which vLLM knows no more
_SECRET = re.compile(r"(?:export\s+)?(\w+)=\"?\$\(cat /secrets/([\w.-]+)\)\"?")
# What follows from the checkpoints, the GPUs and the Truss.
_DECIDED = {
    "port",
    "host",
    "tensor_parallel_size",
    "enable_lora",
    "max_lora_rank",
    "lora_modules",
    "dtype",
    "tokenizer",
    "model",
    "served_model_name",
}


@dataclass(frozen=True, slots=True)
class Deployed:
    """The jobs and checkpoints that a config names, and what else it asks for."""

    jobs: tuple[str, ...]
    checkpoints: tuple[str, ...]
    wishes: Wishes


def read_deployed(config: Path) -> Deployed:
    """Return what the config at *config*, a file or its folder, asks for.

    Raises:
        ConfigError: it cannot be read, names no training checkpoints, or starts no ``vllm serve``.
    """
    file = next((p for n in ("config.yaml", "config.yml") if (p := config / n).is_file()), config)
    where, document = read_config(file)
    training = training_checkpoints(document, where)
    variables = mapping_at(document, "environment_variables", where)
    server = mapping_at(document, "docker_server", where)
    text = str(variables.get(_COMMAND) or server.get("start_command") or "")
    words = _served(text)
    if words is None:
        raise ConfigError(
            "the config starts no `vllm serve`",
            where=where,
            expected="one that `truss train deploy_checkpoints` wrote",
            next_step="give its listing with --artifacts instead of --from",
        )
    model, args = words
    secrets = {name: variable for variable, name in _SECRET.findall(text)}
    named = [*secrets, *(n for n in mapping_at(document, "secrets", where) if n not in secrets)]
    is_fetched = model.startswith(str(training.download_folder))
    max_length = args.pop("max_model_len", None)
    accelerator = mapping_at(document, "resources", where).get("accelerator")
    checkpoints = [
        f"{reference.training_job_id}/{pattern.strip('/')}"
        for reference in training.artifact_references
        for pattern in reference.paths
    ]
    return Deployed(
        tuple(dict.fromkeys(r.training_job_id for r in training.artifact_references)),
        tuple(dict.fromkeys(checkpoints)),
        Wishes(
            model_name=str(document["model_name"]) if document.get("model_name") else None,
            base_model=None if is_fetched else model,
            max_model_len=max_length if isinstance(max_length, int) else None,
            accelerator=str(accelerator) if accelerator else None,
            environment={k: str(v) for k, v in variables.items() if k not in _LEFT},
            secrets=tuple(Secret(name, secrets.get(name)) for name in named),
            engine_args={name: value for name, value in args.items() if name not in _DECIDED},
        ),
    )


def _served(text: str) -> tuple[str, dict[str, object]] | None:
    """Return the model that ``vllm serve`` is started with in *text*, and its arguments by name."""
    words = _split(text)
    if words[:2] in (["sh", "-c"], ["bash", "-c"], ["/bin/sh", "-c"], ["/bin/bash", "-c"]):
        words = _split(" ".join(words[2:3]))
    for at, word in enumerate(words[:-2]):
        if word.rpartition("/")[2] == "vllm" and words[at + 1] == "serve":
            model, *rest = words[at + 2 :]
            return model, dict(_arguments(rest))
    return None


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return []


def _arguments(words: Sequence[str]) -> Iterator[tuple[str, object]]:
    """Yield each option, named as in engine_args, with its value, its values or True."""
    named: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            named.append((name.replace("-", "_"), [value] if equals else []))
        elif named:
            named[-1][1].append(word)
    for name, values in named:
        if not values:
            yield (name.removeprefix("no_"), False) if name.startswith("no_") else (name, True)
        else:
            yield name, _value(values[0]) if len(values) == 1 else [_value(v) for v in values]


def _value(text: str) -> object:
    if text[:1] in "{[" or re.fullmatch(r"-?\d+(\.\d+)?|true|false", text):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text
