"""What the Truss will be: decided from the checkpoints and its user's wishes, before writing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from loader.adapters.attach import LORA_RANKS, name_adapters, smallest_limit
from loader.adapters.base_task import goes_on_with_text
from loader.adapters.config import AdapterConfig, parse_adapter_config
from loader.config.truss_config import DOWNLOAD_FOLDER
from loader.errors import AdapterError, ConfigError
from loader.fetch.files import STATE
from loader.scaffold.base_model import choose_base, describe_base
from loader.scaffold.gpus import Load, Placement, fitting, place
from loader.scaffold.survey import SHARDED, Found
from loader.serve.size import ModelSize, size_of
from loader.serve.vllm.arguments import pod_arguments
from loader.stores.hub import REPO_ID
from loader.stores.registry import is_remote
from loader.types import Kind, ReadyModel, ServedAdapter

Task = Literal["chat", "embeddings", "transcription"]
ENDPOINTS: Mapping[Task, str] = {
    "chat": "/v1/chat/completions",
    "embeddings": "/v1/embeddings",
    "transcription": "/v1/audio/transcriptions",
}
PORT = 8000
DRAIN_S = 8  # Truss's supervisor kills what has not ended 10 s after it was asked to
DEFAULT_TOKENS = 8192
DEFAULT_REQUESTS = 4
# What the pod reads an origin with; on S3 nothing of it is needed where the pod has a role.
_SOURCE_SECRETS = {
    "baseten": ("baseten_api_key",),
    "s3": ("aws_access_key_id", "aws_secret_access_key", "aws_region"),
}
_SLOTS = 4  # adapters that a batch mixes, as serve.arguments has it
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret by its name on the platform, and the variable that has to hold it, if any."""

    name: str
    variable: str | None = None

    def __post_init__(self) -> None:
        if not _VARIABLE.fullmatch(self.variable or "x") or not re.fullmatch(
            r"[A-Za-z0-9_.-]+", self.name
        ):
            raise ConfigError(
                "not the name of a secret",
                where="--secret",
                expected="NAME, or VARIABLE=NAME",
                next_step="give names only: the values stay with the platform",
            )


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asked for; None leaves it to podloader."""

    model_name: str | None = None
    base_model: str | None = None
    max_model_len: int | None = None
    requests: int = DEFAULT_REQUESTS
    accelerator: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[Secret, ...] = ()
    sources: tuple[str, ...] = ()
    engine_args: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Deployment:
    """Everything that the Truss says. ``command`` is what follows ``vllm serve`` in the pod.

    ``gpus`` tells what else would hold the model.
    """

    model_name: str
    task: Task
    chosen: tuple[Found, ...]
    base_model: str | None
    adapter_policy: str | None
    served_model_name: str
    adapters: tuple[str, ...]
    engine_args: Mapping[str, object]
    placement: Placement
    environment: Mapping[str, str]
    secrets: tuple[Secret, ...]
    command: tuple[str, ...]
    gpus: Callable[[], tuple[str, ...]] = field(compare=False)


def decide(chosen: Sequence[Found], wishes: Wishes) -> Deployment:
    """Return the deployment of *chosen*, which go together.

    Raises:
        ConfigError: no base model, a length that the model does not know, GPUs that do not hold it.
        AdapterError: several adapters of which vLLM cannot attach one.
    """
    chosen = tuple(sorted(chosen, key=lambda f: (f.job, f.name, f.rank)))
    first = chosen[0]
    adapters = [f for f in chosen if f.kind is Kind.ADAPTER]
    base_model = choose_base(adapters, wishes.base_model) if adapters else wishes.base_model
    size, config = _size(first, base_model)
    task = _task(first, config)
    tokens = _tokens(task, size, wishes.max_model_len)
    configs = [parse_adapter_config(f.config, Path(f.path)) for f in adapters]
    policy = _policy(configs, config)
    merged = policy == "merge" or (policy == "auto" and is_remote(str(base_model)))
    attached = bool(adapters) and not merged
    rank = smallest_limit(c.max_rank for c in configs) if attached else 0
    slots = min(len(adapters), _SLOTS) if attached else 0
    load = Load(tokens, wishes.requests, rank, slots)
    found = place(size, load, wishes.accelerator)
    dtype = "float16" if size.dtype == "bfloat16" and not found.gpu.bfloat16 else size.dtype
    engine_args: dict[str, object] = {"dtype": dtype, "tensor_parallel_size": found.count}
    if task == "chat" or wishes.max_model_len:
        engine_args["max_model_len"] = tokens
    if attached:
        engine_args["max_lora_rank"] = rank
    if task == "embeddings":
        engine_args["runner"] = "pooling"
    engine_args |= wishes.engine_args
    model_name = _model_name(wishes.model_name, first, base_model if adapters else None)
    folders = [(f.job, Path(DOWNLOAD_FOLDER) / f.path) for f in adapters]
    named = name_adapters(folders) if attached else ()
    ready = ReadyModel(
        path=_served_path(first, str(base_model) if attached else None, merged=bool(adapters)),
        adapters=tuple(
            ServedAdapter(a.name, a.folder, c.max_rank)
            for a, c in zip(named, configs if attached else (), strict=True)
        ),
        max_lora_rank=rank or None,
        tokenizer=Path(DOWNLOAD_FOLDER) / first.path
        if attached
        else _served_path(first, None, merged=bool(adapters)),
        provenance={},
    )
    served = str(base_model) if attached else model_name
    return Deployment(
        model_name=model_name,
        task=task,
        chosen=chosen,
        base_model=base_model,
        adapter_policy=policy,
        served_model_name=served,
        adapters=tuple(a.name for a in named),
        engine_args=engine_args,
        placement=found,
        environment=wishes.environment,
        secrets=_secrets(base_model, wishes),
        command=pod_arguments(
            ready,
            engine_args,
            ("--port", str(PORT)),
            drain_timeout_s=DRAIN_S,
            served_model_name=served,
            cpu=False,
        ),
        gpus=partial(fitting, size, load),
    )


def _served_path(first: Found, base_model: str | None, *, merged: bool) -> Path:
    """Return the folder that the pod's engine is given, as far as it is known before."""
    if base_model is not None:
        return Path(base_model)
    if merged or first.kind in SHARDED:
        made = "merge" if merged else "consolidate"
        return Path(DOWNLOAD_FOLDER) / STATE / "models" / f"{made}-DIGEST"
    return Path(DOWNLOAD_FOLDER) / first.path


def _size(first: Found, base_model: str | None) -> tuple[ModelSize, Mapping[str, object]]:
    """Return how large the model is, and its config."""
    if first.kind is Kind.ADAPTER:
        base = describe_base(str(base_model))
        return size_of(base.config, base.weight_bytes, base.came_from), base.config
    config = first.config
    if not config and base_model:
        config = describe_base(base_model).config
    if not config:
        raise ConfigError(
            "the checkpoint came without a config.json",
            where=first.path,
            next_step="give the model it was trained from with --base-model",
        )
    return size_of(config, first.weight_bytes, "the listing"), config


def _task(found: Found, config: Mapping[str, object]) -> Task:
    if config.get("model_type") == "whisper":
        return "transcription"
    names = config.get("architectures")
    bare = isinstance(names, list) and bool(names) and all(str(n).endswith("Model") for n in names)
    return "embeddings" if found.embeds or bare else "chat"


def _tokens(task: Task, size: ModelSize, asked: int | None) -> int:
    """Return how long one request may be."""
    if asked is None:
        longest = size.context or DEFAULT_TOKENS
        return longest if task == "transcription" else min(longest, DEFAULT_TOKENS)
    if asked < 1 or (size.context is not None and asked > size.context):
        raise ConfigError(
            "a length that the model does not know",
            where="--max-model-len",
            expected=f"1 to {size.context or 'the length of its context'}",
            got=str(asked),
            next_step="give a length within it",
        )
    return asked


def _policy(configs: Sequence[AdapterConfig], base: Mapping[str, object]) -> str | None:
    """Return the adapter_policy, by what the configs of the adapters and of the base say."""
    task = () if goes_on_with_text(base) else ("its base is of another task than text",)
    obstacles = {c.folder.as_posix(): (*_obstacles(c), *task) for c in configs}
    problems = [f"{path}: {'; '.join(found)}" for path, found in obstacles.items() if found]
    if len(configs) > 1 and problems:
        raise AdapterError(
            "adapters that vLLM cannot attach, and one alone could be merged",
            problems=problems,
            next_step="make a Truss for each of these",
        )
    if not configs:
        return None
    if problems:
        return "merge"
    return "attach" if len(configs) > 1 else "auto"


def _obstacles(config: AdapterConfig) -> tuple[str, ...]:
    found = config.attach_obstacles()
    too_high = config.max_rank > LORA_RANKS[-1]
    return (*found, f"rank {config.max_rank}, above vLLM's limit") if too_high else found


def _model_name(asked: str | None, first: Found, base_model: str | None) -> str:
    name = asked or (base_model or "").rstrip("/").rpartition("/")[2]
    name = name or "-".join(filter(None, (first.job, first.name.rpartition("/")[2])))
    if asked and _UNSAFE.search(asked):
        raise ConfigError(
            "a model name that Truss does not take",
            where="--name",
            expected="letters, digits, '.', '_' and '-'",
            got=asked,
            next_step="choose another name",
        )
    return _UNSAFE.sub("-", name)


def _secrets(base_model: str | None, wishes: Wishes) -> tuple[Secret, ...]:
    """Return the secrets that the Truss names: what it needs itself, and every one asked for."""
    own = ["hf_access_token"] if base_model and REPO_ID.fullmatch(base_model) else []
    for source in wishes.sources:
        own += _SOURCE_SECRETS.get(source.partition(":")[0], ())
    return tuple(dict.fromkeys([*map(Secret, own), *wishes.secrets]))
