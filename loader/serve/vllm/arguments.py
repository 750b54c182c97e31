"""ReadyModel and engine_args -> the arguments of ``vllm serve``.

The engine inside a Truss and the server that a container becomes get the same arguments through
vLLM's own parser, so that one config means one thing in both.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from loader.errors import ConfigError
from loader.serve.model import base_name
from loader.serve.vllm.releases import is_cpu_build
from loader.types import ReadyModel

_SECTION = "model_metadata.podloader.engine_args"
# Arguments that follow from the checkpoints, and the setting that decides each.
_OWNED = {
    "model": "training_checkpoints or base_model",
    "tokenizer": "the checkpoint's own tokenizer",
    "served_model_name": "served_model_name",
    "trust_remote_code": "trust_remote_code",
    "enable_lora": "adapter_policy",
    "lora_modules": "training_checkpoints",
}
# vllm/engine/arg_utils.py; ``config`` is a file with more of them.
_SIZING: Mapping[str, tuple[tuple[str, ...], type]] = {
    "tensor_parallel_size": (("-tp",), int),
    "pipeline_parallel_size": (("-pp",), int),
    "data_parallel_size": (("-dp",), int),
    "prefill_context_parallel_size": (("-pcp",), int),
    "nnodes": (("-n",), int),
    "node_rank": (("-r",), int),
    "speculative_config": (("-sc",), str),
    "spec_method": ((), str),
    "spec_model": ((), str),
    "spec_tokens": ((), str),
    "model_loader_extra_config": ((), str),
    "gpu_memory_utilization": ((), float),
    "kv_cache_memory_bytes": ((), str),
    "cpu_offload_gb": ((), float),
    "quantization": (("-q",), str),
    "dtype": ((), str),
    "load_format": ((), str),
    "hf_overrides": ((), str),
    "config": ((), str),
    "runner": ((), str),
    "convert": ((), str),
}
_FIELD = re.compile(r"^(--?[a-z][\w-]*)\.[^=\s]+")
_WORKER_EXTENSION = "loader.serve.vllm.lora_manager.AdapterWorker"
# Adapters that one batch may mix. Each takes memory for its own rank beside the weights; the
# others wait in main memory, so none is read from disk twice.
_ADAPTERS_IN_A_BATCH = 4


def serve_arguments(
    ready: ReadyModel,
    engine_args: Mapping[str, object],
    *,
    served_model_name: str | None = None,
    trust_remote_code: bool = False,
    load_format: str | None = None,
    extra: Sequence[str] = (),
    cpu: bool | None = None,
) -> tuple[str, ...]:
    """Return what follows ``vllm serve`` on its command line; *extra* stands last and wins.

    Quick: vLLM is not imported. ``cpu`` is whether vLLM's CPU build will run it, by default
    whether it is the one installed here.

    Raises:
        ConfigError: *engine_args* hold what podloader itself decides, or a name is served twice.
    """
    _refuse_owned(engine_args)
    name = base_name(ready, served_model_name)
    arguments: dict[str, object] = {
        "tokenizer": str(ready.tokenizer),
        "served_model_name": name,
        "trust_remote_code": trust_remote_code,
        "load_format": load_format,
    }
    if ready.adapters:
        _refuse_name_twice([name, *(a.name for a in ready.adapters)])
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": ready.max_lora_rank,
            "lora_modules": [{"name": a.name, "path": str(a.path)} for a in ready.adapters],
        }
    arguments |= engine_args
    if not ready.adapters and arguments.get("max_loras"):
        arguments["enable_lora"] = True  # room for adapters that come while it serves
    if ready.adapters or arguments.get("max_loras"):
        on_cpu = is_cpu_build() if cpu is None else cpu
        slots = _adapter_slots(len(ready.adapters), arguments.get("max_loras"), on_cpu)
        arguments["max_loras"] = slots
        if isinstance(slots, int):
            arguments.setdefault("max_cpu_loras", max(slots, len(ready.adapters)))
    return (str(ready.path), *written(arguments), *extra)


def written(arguments: Mapping[str, object]) -> tuple[str, ...]:
    """Return *arguments*, by their names in ``engine_args``, as words of a command line."""
    return tuple(word for key, value in arguments.items() for word in _write(key, value))


def pod_arguments(
    ready: ReadyModel,
    engine_args: Mapping[str, object],
    given: Sequence[str],
    *,
    drain_timeout_s: float,
    served_model_name: str | None = None,
    trust_remote_code: bool = False,
    load_format: str | None = None,
    cpu: bool | None = None,
) -> tuple[str, ...]:
    """Return what ``podloader serve`` gives ``vllm serve``; *given* stands last and wins.

    Raises:
        ConfigError: as ``serve_arguments``.
    """
    drain: tuple[str, ...] = ()
    if "shutdown_timeout" not in engine_args:
        drain = ("--shutdown-timeout", str(round(drain_timeout_s)))
    return serve_arguments(
        ready,
        engine_args,
        served_model_name=served_model_name,
        trust_remote_code=trust_remote_code,
        load_format=load_format,
        extra=(*drain, *given),
        cpu=cpu,
    )


def sizing_arguments(words: Sequence[str]) -> dict[str, object]:
    """Return, as engine_args, those of ``vllm serve``'s *words* that decide what is prepared.

    They say how much room it takes and what the model is for. What vLLM will refuse itself is left
    to it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, (short, kind) in _SIZING.items():
        spelled = {f"--{name}", f"--{name.replace('_', '-')}"}
        parser.add_argument(*short, *spelled, dest=name, type=kind, default=argparse.SUPPRESS)
    try:
        # A field of one, as --hf-overrides.vocab_size, is one that is given, too.
        return vars(parser.parse_known_args([_FIELD.sub(r"\1", word) for word in words])[0])
    except (argparse.ArgumentError, SystemExit):
        return {}


def parse_arguments(arguments: Sequence[str]) -> Any:
    """Return vLLM's namespace for ``vllm serve``'s *arguments*, after vLLM's own checks.

    Raises:
        ConfigError: with vLLM's message.
    """
    from loader.serve.vllm.private import (
        FlexibleArgumentParser,
        make_arg_parser,
        validate_parsed_serve_args,
    )

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    parser.error = _refuse  # argparse would print its usage and end the process
    try:
        args = parser.parse_args(list(arguments))
        validate_parsed_serve_args(args)
    except (ValueError, TypeError) as error:
        _refuse(str(error))
    args.model = args.model_tag  # as vLLM's own `serve` does
    if args.enable_lora:
        if args.worker_extension_cls:
            raise ConfigError(
                "a worker_extension_cls beside adapters",
                where=_SECTION,
                expected=f"{_WORKER_EXTENSION}, which podloader sets itself",
                got=args.worker_extension_cls,
                next_step="leave it out, or merge the adapter",
            )
        args.worker_extension_cls = _WORKER_EXTENSION
    return args


def check_engine_args(engine_args: Mapping[str, object]) -> None:
    """Raise ConfigError for names that vLLM does not know, each with the nearest that it does."""
    from vllm import AsyncEngineArgs

    from loader.serve.vllm.private import BaseFrontendArgs

    _refuse_owned(engine_args)
    fields = (*dataclasses.fields(AsyncEngineArgs), *dataclasses.fields(BaseFrontendArgs))
    public = {field.name for field in fields if not field.name.startswith("_")}
    known = sorted(public - _OWNED.keys())
    if unknown := [_suggest(name, known) for name in engine_args if name not in known]:
        raise ConfigError(
            "engine arguments that vLLM does not know",
            where=_SECTION,
            expected="names of vLLM's AsyncEngineArgs",
            problems=unknown,
            next_step="correct or remove them",
        )


def _adapter_slots(adapters: int, asked: object, cpu: bool) -> object:
    """Return how many adapters one batch may mix.

    On a CPU one slot has to stay empty where vLLM runs without ``loader.serve.vllm.lora_manager``.
    """
    slots = min(adapters, _ADAPTERS_IN_A_BATCH) if asked is None else asked
    if cpu and isinstance(slots, int):
        return max(slots, adapters + 1)
    return slots


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.lower().replace("-", "_").lstrip("_"), known, n=1)
    return f"{name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _refuse(message: str) -> NoReturn:
    raise ConfigError(
        "vLLM refuses its arguments",
        where=_SECTION,
        got=message,
        next_step="correct the value; `vllm serve --help=all` lists what each argument takes",
    ) from None


def _refuse_owned(engine_args: Mapping[str, object]) -> None:
    if owned := [name for name in engine_args if name in _OWNED]:
        raise ConfigError(
            "engine arguments that podloader decides itself",
            where=_SECTION,
            problems=[f"{name!r} follows from {_OWNED[name]}" for name in owned],
            next_step="remove them",
        )


def _refuse_name_twice(names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            "one name for two served models",
            got=", ".join(twice),
            next_step="choose another served_model_name",
        )


def _write(key: str, value: object) -> list[str]:
    """Return ``--key value`` as vLLM's parser reads it back: lists as words, mappings as JSON."""
    flag = "--" + key.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag.removeprefix("--")]
    if isinstance(value, (list, tuple)) and key == "middleware":  # which vLLM takes one by one
        return [word for one in value for word in (flag, str(one))]
    if isinstance(value, (list, tuple)):
        return [flag, *map(_word, value)]
    return [flag, _word(value)]


def _word(value: object) -> str:
    return json.dumps(value) if isinstance(value, Mapping) else str(value)
