"""Every name of vLLM that podloader uses beyond ``import vllm``; no other file imports one.

vLLM keeps its command line, its HTTP API and its plugin groups. The rest has no promise: it moves
between releases, two of which come in a month. So each name stands here once, with every module
that holds it in one of the proved releases, the newest first, and with why it is used.
``from loader.serve.vllm.private import make_arg_parser`` finds the one of the vLLM that is here.

``tests/engines`` compares these tables, and every call that the room makes of what they name, with
the sources of each release (``make engines``).
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from loader.errors import EngineError
from loader.serve.vllm.releases import PROVED, RANGE, installed_release, is_cpu_build, is_proved


@dataclass(frozen=True, slots=True)
class Private:
    """A name, why it is used, and where: modules for what is imported, else ``module:class``.

    ``members`` are the attributes that the room uses of it, with their parameters where it takes
    their place. ``patched``: the name itself is replaced in its module, which has to call it.
    """

    why: str
    places: tuple[str, ...]
    members: tuple[str, ...] = ()
    patched: bool = False


_LAUNCHERS = "vllm.entrypoints.launchers"
_CLI_ARGS = ("vllm.entrypoints.common.cli_args", f"{_LAUNCHERS}.cli_args")
_SERVING = "vllm.entrypoints.openai"
_SPEECH = "vllm.entrypoints.speech_to_text"

IMPORTED = {
    # The parser of `vllm serve`, so that one config means one thing in a Truss and in a container.
    "FlexibleArgumentParser": Private(
        "reads JSON and dotted arguments", ("vllm.utils.argparse_utils",), ("error", "parse_args")
    ),
    "make_arg_parser": Private("knows every argument", _CLI_ARGS),
    "validate_parsed_serve_args": Private("knows which contradict each other", _CLI_ARGS),
    "BaseFrontendArgs": Private("the handlers' arguments, apart from the socket's", _CLI_ARGS),
    "validate_api_server_args": Private(
        "knows the names of parsers, before the engine starts", (f"{_LAUNCHERS}.launcher",)
    ),
    "ToolParserManager": Private(
        "tool_parser_plugin; documented for plugins",
        ("vllm.tool_parsers",),
        ("import_tool_parser",),
    ),
    "ReasoningParserManager": Private(
        "reasoning_parser_plugin; documented",
        ("vllm.reasoning",),
        ("import_reasoning_parser",),
    ),
    # The OpenAI server in parts: as a whole, `vllm serve` has no place where it would wait for the
    # checkpoints with its imports done, or for its first answer before clients are let in.
    "build_async_engine_client": Private(
        "the engine, as the server starts and stops it", (f"{_LAUNCHERS}.api_server.entry",)
    ),
    "build_app": Private("routes and middleware", (f"{_LAUNCHERS}.app",)),
    "init_app_state": Private("the handlers behind them", (f"{_LAUNCHERS}.api_server.app_state",)),
    "serve_http": Private("drains requests before it ends", (f"{_LAUNCHERS}.launcher",)),
    "get_uvicorn_log_config": Private(
        "log_config_file and quiet endpoints", (f"{_LAUNCHERS}.utils.server_utils",)
    ),
    "run_headless": Private("a node that another one leads", ("vllm.entrypoints.cli.serve",)),
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": Private("a documented variable, read", ("vllm.envs",)),
    "VLLM_CACHE_ROOT": Private("a documented variable, read", ("vllm.envs",)),
    # What the handlers take and return: `predict` calls them without a socket between.
    "ChatCompletionRequest": Private("a body", (f"{_SERVING}.chat_completion.protocol",)),
    "CompletionRequest": Private("a body", (f"{_SERVING}.completion.protocol",)),
    "EmbeddingRequest": Private("a body", ("vllm.entrypoints.pooling.embed.protocol",)),
    "TranscriptionRequest": Private("a body", (f"{_SPEECH}.transcription.protocol",)),
    "read_upload_with_limit": Private("the limit of a sound file", (f"{_SPEECH}.base.utils",)),
    "ErrorResponse": Private("a refusal", ("vllm.entrypoints.serve.engine.protocol",), ("error",)),
    "create_error_response": Private(
        "the status that an exception is answered with", ("vllm.entrypoints.serve",)
    ),
    # Adapters by name. Around /v1/load_lora_adapter, which takes any path of the machine, there is
    # no hook, and what a LoRAResolver refuses is answered without a reason.
    "LoRARequest": Private("an adapter", ("vllm.lora.request",)),
    "get_adapter_absolute_path": Private("what lora_path means to vLLM", ("vllm.lora.utils",)),
    "OpenAIServingModels": Private(
        "the names that requests may give",
        (f"{_SERVING}.models.serving",),
        (
            "engine_client",
            "init_static_loras",
            "is_base_model",
            "load_lora_adapter(request, base_model_name)",
            "lora_id_counter",
            "lora_requests",
            "lora_resolver_lock",
            "lora_resolvers",
            "model_config",
            "model_name(lora_request)",
            "resolve_lora(lora_name)",
            "show_available_models",
            "static_lora_modules",
            "unload_lora_adapter(request)",
        ),
    ),
    "SamplingParams": Private("the canary's", ("vllm.sampling_params",)),
    "LRUCacheLoRAModelManager": Private(
        "the slots of adapters: on a CPU one has to stay empty",
        ("vllm.lora.model_manager",),
        ("_create_lora_modules", "lora_slots"),
    ),
    "LRUCacheWorkerLoRAManager": Private(
        "makes it", ("vllm.lora.worker_manager",), ("_manager_cls",)
    ),
    # Which tensors of an adapter it uses: no API says that of a model, or of an adapter loaded.
    "WorkerLoRAManager": Private(
        "takes adapters in, in every worker",
        ("vllm.lora.worker_manager",),
        ("_load_adapter(lora_request)",),
    ),
    "LoRAModelManager": Private(
        "wraps the layers that it has LoRA for", ("vllm.lora.model_manager",)
    ),
    "parse_fine_tuned_lora_name": Private("its names of a tensor's module", ("vllm.lora.utils",)),
    "supports_lora": Private("", ("vllm.model_executor.models.interfaces",)),
    "EngineArgs": Private(
        "", ("vllm.engine.arg_utils",), ("create_engine_config", "create_model_config")
    ),
    "get_model_cls": Private("", ("vllm.model_executor.model_loader.utils",)),
    "initialize_model": Private("builds it", ("vllm.model_executor.model_loader.utils",)),
    "set_current_vllm_config": Private("", ("vllm.config.vllm",)),
    "init_distributed_environment": Private("", ("vllm.distributed.parallel_state",)),
    "ensure_model_parallel_initialized": Private("", ("vllm.distributed.parallel_state",)),
    # Weights as they arrive: a load format is registered by a class, and of vLLM's own only the
    # reading of safetensors files is replaced.
    "register_model_loader": Private("documented", ("vllm.model_executor.model_loader",)),
    "DefaultModelLoader": Private(
        "chooses the files, hands tensors over, checks that all came",
        ("vllm.model_executor.model_loader.default_loader",),
        ("_get_weights_iterator(source)", "load_config"),
    ),
    "safetensors_weights_iterator": Private(
        "reads them", ("vllm.model_executor.model_loader.default_loader",), patched=True
    ),
    "should_skip_weight": Private(
        "experts of other ranks", ("vllm.model_executor.model_loader.ep_weight_filter",)
    ),
    # Reached into from this file alone.
    "ModelRegistry": Private(
        "looks at an architecture while its weights are on their way",
        ("vllm.model_executor.models.registry",),
    ),
    "get_mp_context": Private(
        "how the engine's process starts: no setting forks one where vLLM would spawn it",
        ("vllm.v1.engine.utils",),
        patched=True,
    ),
    "EngineCoreProc": Private("imported before a fork", ("vllm.v1.engine.core",)),
    "CPUWorker": Private("imported before a fork", ("vllm.v1.worker.cpu_worker",)),
    "Worker": Private("imported before a fork", ("vllm.v1.worker.gpu_worker",)),
}

REACHED = {
    # What vLLM hands out, by the name that the room's variable or vLLM's own attribute has (with a
    # dot before it where it is always an attribute).
    "engine": Private(
        "AsyncLLM",
        ("vllm.v1.engine.async_llm:AsyncLLM", "vllm.engine.protocol:EngineClient"),
        (
            "add_lora",
            "collective_rpc",
            "engine_core",
            "errored",
            "generate",
            "get_supported_tasks",
            "model_config",
            "remove_lora",
            "shutdown(timeout)",
        ),
    ),
    "engine_core": Private("", ("vllm.v1.engine.core_client:MPClient",), ("resources",)),
    "resources": Private(
        "", ("vllm.v1.engine.core_client:BackgroundResources",), ("ctx", "engine_manager")
    ),
    "engine_manager": Private(
        "", ("vllm.v1.engine.utils:CoreEngineProcManager",), ("failed_proc_name", "finished_procs")
    ),
    "state": Private(
        "the handlers of an app",
        (
            f"{_LAUNCHERS}.api_server.app_state:state",
            "vllm.entrypoints.generate.api_router:state",
            f"{_SPEECH}.factories:state",
            "vllm.entrypoints.pooling.factories:state",
            f"{_LAUNCHERS}.launcher:state",
        ),
        (
            "openai_serving_chat",
            "openai_serving_completion",
            "openai_serving_models",
            "openai_serving_transcription",
            "server",  # uvicorn's
            "serving_embedding",
        ),
    ),
    "openai_serving_chat": Private(
        "", (f"{_SERVING}.chat_completion.serving:OpenAIServingChat",), ("create_chat_completion",)
    ),
    "openai_serving_completion": Private(
        "", (f"{_SERVING}.completion.serving:OpenAIServingCompletion",), ("create_completion",)
    ),
    "openai_serving_transcription": Private(
        "",
        (f"{_SPEECH}.transcription.serving:OpenAIServingTranscription",),
        ("create_transcription",),
    ),
    "serving_embedding": Private(
        "", ("vllm.entrypoints.pooling.base.serving:PoolingBaseServing",), ("__call__",)
    ),
    "loaded": Private(
        "",
        ("vllm.lora.request:LoRARequest",),
        ("is_3d_lora_weight", "lora_int_id", "lora_name", "lora_path"),
    ),
    "model_runner": Private(
        "of a worker", ("vllm.v1.worker.gpu_model_runner:GPUModelRunner",), ("kv_caches",)
    ),
    ".error": Private(
        "", ("vllm.entrypoints.serve.engine.protocol:ErrorInfo",), ("code", "message")
    ),
    "card": Private("", ("vllm.entrypoints.serve.engine.protocol:ModelCard",), ("id", "root")),
    "shown": Private("", ("vllm.entrypoints.serve.engine.protocol:ModelList",), ("data",)),
    "lora_module": Private("", (f"{_SERVING}.models.protocol:LoRAModulePath",), ("name", "path")),
    "request": Private(
        "",
        ("vllm.entrypoints.serve.lora.protocol:LoadLoRAAdapterRequest",),
        ("is_3d_lora_weight", "load_inplace", "lora_name", "lora_path"),
    ),
    "lora_id_counter": Private("", ("vllm.utils.counter:AtomicCounter",), ("inc",)),
    "model_config": Private("", ("vllm.config.model:ModelConfig",), ("get_vocab_size", "model")),
    "registry": Private("", ("vllm.model_executor.models.registry:_ModelRegistry",), ("models",)),
    "architecture": Private(
        "",
        ("vllm.model_executor.models.registry:_BaseRegisteredModel",),
        ("inspect_model_cls",),
    ),
    "lora_manager": Private(
        "",
        ("vllm.lora.model_manager:LoRAModelManager",),
        ("is_pooling_model", "model", "modules", "packed_modules"),
    ),
    "loaded_lora": Private("", ("vllm.lora.lora_model:LoRAModel",), ("loras",)),
    "lora_request": Private("", ("vllm.lora.request:LoRARequest",), ("lora_path",)),
    "vllm_config": Private("", ("vllm.config.vllm:VllmConfig",), ("lora_config", "model_config")),
    "args": Private(
        "arguments of `vllm serve`",
        (*(f"{module}:args" for module in _CLI_ARGS), "vllm.engine.arg_utils:args"),
        (
            "api_server_count",
            "data_parallel_multi_port_external_lb",
            "data_parallel_size",
            "disable_uvicorn_access_log",
            "enable_lora",
            "enable_ssl_refresh",
            "grpc",
            "h11_max_header_count",
            "h11_max_incomplete_event_size",
            "headless",
            "host",
            "lora_modules",
            "model",
            "model_tag",
            "nnodes",
            "numa_bind",
            "port",
            "reasoning_parser_plugin",
            "served_model_name",
            "ssl_ca_certs",
            "ssl_cert_reqs",
            "ssl_certfile",
            "ssl_ciphers",
            "ssl_keyfile",
            "tool_parser_plugin",
            "uds",
            "uvicorn_log_level",
            "worker_extension_cls",
        ),
    ),
}

SPOKEN = {
    # Words that vLLM and podloader both know, and the module that says them.
    "vllm.general_plugins": "vllm.plugins",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "vllm.envs",
    "VLLM_WORKER_MULTIPROC_METHOD": "vllm.envs",
    "VLLM_ENGINE_READY_TIMEOUT_S": "vllm.envs",
    "VLLM_PLUGINS": "vllm.envs",
    "VLLM_PP_LAYER_PARTITION": "vllm.envs",
    "EngineCore": "vllm.v1.engine.utils",  # begins the name of the process that holds the model
}


def __getattr__(name: str) -> Any:
    """Import a name of ``IMPORTED`` from wherever the vLLM that is here has it.

    Raises:
        EngineError: it has it nowhere.
    """
    if name not in IMPORTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_module_of(name), name)


def _module_of(name: str) -> ModuleType:
    places = IMPORTED[name].places
    for place in places:
        try:
            module = import_module(place)
        except ModuleNotFoundError as error:
            if not place.startswith(f"{error.name}"):
                raise  # a package that vLLM itself needs
            continue
        if hasattr(module, name):
            return module
    raise _missing(name, places)


def _missing(name: str, places: tuple[str, ...]) -> EngineError:
    release = installed_release()
    return EngineError(
        "this vLLM lacks what podloader needs of it",
        where=" or ".join(f"{place}.{name}" for place in places),
        expected=f"vLLM {RANGE}, proved with {', '.join(PROVED)}",
        got=f"vLLM {release or 'of no version'}",
        next_step="install it anew: its files are not those of that release"
        if is_proved(release)
        else f"install vllm=={PROVED[-1]}",
    )


def import_server() -> None:
    """Import vLLM with its async engine and its OpenAI serving layer."""
    import uvloop  # noqa: F401

    _module_of("build_async_engine_client")


def import_engine_core() -> None:
    """Import what the engine's processes need beyond ``import_server``."""
    _module_of("EngineCoreProc")
    if is_cpu_build():
        _module_of("CPUWorker")
    else:  # on another platform than CUDA's and ROCm's it may not even import
        with contextlib.suppress(Exception):
            _module_of("Worker")


def inspect_architecture(name: str) -> None:
    """Let vLLM find out about an architecture, and keep that in its cache."""
    registry = __getattr__("ModelRegistry")
    architecture = registry.models[name]
    architecture.inspect_model_cls()


class NoLoRAError(Exception):
    """Adapters cannot be attached to a model of this architecture."""


@contextlib.contextmanager
def built_on_meta(model: Path, *, towers: bool) -> Iterator[tuple[Any, Any]]:
    """Give vLLM's config and its model of the folder *model*, without a weight.

    For a process that ends afterwards: vLLM's groups of processes are begun in it.

    Raises:
        NoLoRAError: vLLM has none for this architecture.
    """
    import torch

    find = __getattr__
    wanted = find("EngineArgs")(
        model=str(model),
        load_format="dummy",
        trust_remote_code=False,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_lora=True,
        enable_tower_connector_lora=towers,
    )
    # First: from 0.33 on an engine's config with LoRA is refused where the model has none.
    model_class = find("get_model_cls")(wanted.create_model_config())
    if not find("supports_lora")(model_class):
        raise NoLoRAError(f"no LoRA for {model_class.__name__}")
    vllm_config = wanted.create_engine_config()
    folder = tempfile.mkdtemp(prefix="podloader-")
    try:
        with find("set_current_vllm_config")(vllm_config):
            find("init_distributed_environment")(1, 0, f"file://{folder}/group", 0, "gloo")
            find("ensure_model_parallel_initialized")(1, 1)
            with torch.device("meta"):
                built = find("initialize_model")(vllm_config=vllm_config)
            yield vllm_config, built
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def process_context(make: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Let vLLM start its engine in this block from ``make(own)``; *own* makes vLLM's context."""
    module = _module_of("get_mp_context")
    own = module.get_mp_context
    module.get_mp_context = lambda: make(own)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.get_mp_context = own  # type: ignore[attr-defined]


@contextlib.contextmanager
def safetensors_read_by(read: Callable[..., Any]) -> Iterator[None]:
    """Let what vLLM's loader makes in this block read files by ``read(own, …)``.

    *own* is vLLM's iterator, the rest its arguments.
    """
    module = _module_of("safetensors_weights_iterator")
    own = module.safetensors_weights_iterator
    module.safetensors_weights_iterator = partial(read, own)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.safetensors_weights_iterator = own  # type: ignore[attr-defined]


def close_sockets(engine: Any) -> None:
    """Close what vLLM leaves to the garbage collector, which complains of it."""
    engine.engine_core.resources.ctx.destroy(linger=0)


def crash_code(engine: Any) -> int | None:
    """Return the exit code of the process that ended *engine*, None after an orderly end."""
    engine_manager = engine.engine_core.resources.engine_manager
    if engine_manager is None or engine_manager.failed_proc_name is None:
        return None
    code: int = engine_manager.finished_procs().get(engine_manager.failed_proc_name, 1)
    return code
