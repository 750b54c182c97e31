"""vLLM's OpenAI server in this process, on a socket that has been listening all along.

As vLLM's own ``run_server`` does, with three differences: the socket is given, one request has gone
through before the first client's, and ``/status`` and podloader's metrics go on being answered.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import socket
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

from loader.errors import ConfigError, LoaderError
from loader.serve.canary import Said, canary_body, check_adapters, read_said
from loader.serve.vllm.channel import Channel
from loader.serve.vllm.draining import Drain, Refusing
from loader.serve.vllm.failures import start_failure
from loader.serve.vllm.forkserver import METHOD
from loader.serve.vllm.orphans import OrphanGuard
from loader.serve.vllm.private import (
    crash_code,
    import_engine_core,
    import_server,
    inspect_architecture,
    process_context,
)
from loader.serve.vllm.releases import is_cpu_build
from loader.serve.vllm.resolver import take_loading_over
from loader.serve.vllm.tasks import check_sound
from loader.status.replies import STATUS_PATHS, status_reply
from loader.status.state import Boot
from loader.weights.inspect import read_json

Stage = Callable[[str], AbstractContextManager[None]]
_CORE = "EngineCore"
_ENGINE_DIED = 6  # as EngineError
_PROMPT = "Hello"
_CLOSE_S = 1
_ACCEPTED_S = 0.1  # for the requests of connections that were accepted last
_OPEN_FILES = 65_535  # as `vllm serve` asks for


def import_engine() -> None:
    """Import what vLLM's server and the engine's processes need.

    This process has no threads but its main one, so the engine's processes may be forks of it and
    need not import it all again. vLLM itself falls back to spawn where a fork will not do, as when
    CUDA is initialised.
    """
    if os.environ.setdefault(METHOD, "fork") == "fork" and is_cpu_build():
        # vLLM leaves a core to its scheduler, by the environment of processes that it spawns. A
        # fork's OpenMP has read its own before, and would take every core: ten times slower.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) - 1, 1)))
    import_server()
    import_engine_core()
    # The engine collects garbage several times while it starts: not among these objects, which all
    # stay, and whose pages a fork would have to copy for it.
    gc.freeze()


def inspect_model(config: Path) -> None:
    """Let vLLM find out about the architectures in *config*, and keep that in its cache.

    It imports itself once more for that, in a process that it starts. A pod's cache is empty, so
    this would come after the download. What goes wrong here, the engine's start will tell.
    """
    with contextlib.suppress(Exception):
        names = read_json(config).get("architectures")
        for name in names if isinstance(names, list) else ():
            inspect_architecture(name)


def serve_openai(
    args: Any, listening: socket.socket, channel: Channel, stage: Stage, *, canary: bool
) -> int:
    """Serve what *args*, vLLM's namespace, ask for; return the exit code when it is over.

    With *canary*, adapters prove their effect before the first client.

    Raises:
        AdapterError: an adapter that changes nothing.
        EngineError: vLLM did not start.
    """
    import uvloop

    check_sound(Path(args.model))
    # The engine's processes are forks of this one: none may keep the port open when this is gone.
    os.register_at_fork(after_in_child=listening.close)
    if args.headless:
        return work_headless(args)
    code: int = uvloop.run(_serve(args, listening, channel, stage, canary))
    return code


def work_headless(args: Any) -> int:
    """Be a node that another one leads, until its workers end; return the exit code.

    Raises:
        EngineError: vLLM did not start.
    """
    from loader.serve.vllm.private import run_headless

    args.api_server_count = 0  # as vLLM's own `serve` does
    try:
        run_headless(args)
    except Exception as error:
        raise start_failure(error, args.model, vars(args)) from error
    return _ENGINE_DIED


def check_mode(args: Any, address: Mapping[str, object]) -> None:
    """Raise ConfigError for arguments of ``vllm serve`` that need another server than this one.

    *address* holds what the port has been served by, under vLLM's names: nobody was let in whom
    vLLM would not let in. So it does with the nodes that a model is spread over.
    """
    problems = [
        f"--{name.replace('_', '-')}"
        for name in ("grpc", "uds", "data_parallel_multi_port_external_lb")
        if getattr(args, name, None)
    ]
    if args.headless and not address["headless"]:
        problems.append("--headless, which follows from --node-rank")
    if args.nnodes > 1 and args.data_parallel_size > 1:
        problems.append("--data-parallel-size beside --nnodes")
    if (args.api_server_count or 1) > 1:
        problems.append(f"--api-server-count {args.api_server_count}")
    problems += [
        f"--{name.replace('_', '-')}, in another place or by an abbreviation"
        for name, value in address.items()
        if name != "headless" and (getattr(args, name) or None) != (value or None)
    ]
    if problems:
        raise ConfigError(
            "arguments of vLLM that podloader does not serve with",
            problems=problems,
            next_step="leave them out, or run `podloader prepare` and then `vllm serve`; where to "
            "listen, whom to let in and which node this is are read in full words, after -- or in "
            "engine_args, alone",
        )


async def _serve(
    args: Any, listening: socket.socket, channel: Channel, stage: Stage, canary: bool
) -> int:
    import asyncio

    from loader.serve.vllm.private import build_app, init_app_state

    method = os.environ[METHOD]
    async with AsyncExitStack() as stack:
        try:
            with stage("engine load"):
                engine = await _start_engine(stack, args, method)
                guard = OrphanGuard(_CORE)
                stack.callback(guard.close)
                tasks = await engine.get_supported_tasks()
                app = build_app(args, tasks, engine.model_config)
                await init_app_state(engine, app.state, args, tasks)
                stack.callback(take_loading_over(app.state.openai_serving_models, canary).close)
            if "generate" in tasks:
                await _warm_up(app.state, args, stage, canary)
        except LoaderError:
            raise
        except Exception as error:
            raise start_failure(error, args.model, vars(args)) from error
        channel.send("loaded")
        go = await asyncio.to_thread(_wait_for_go, channel)
        if go is None:
            return 1
        drain = Drain(engine, Boot.from_json(go["boot"]))
        _go_on_telling(app, drain)
        over = await _serve_http(app, listening, args)
        if drain.begun:
            await _give_port_back(app, channel)
        code = _exit_code(engine)
    await over
    return code


def _wait_for_go(channel: Channel) -> Mapping[str, Any] | None:
    while (go := channel.receive()) is not None and go["kind"] != "go":
        pass  # a config that arrived while the engine was told to load
    return go


async def _start_engine(stack: AsyncExitStack, args: Any, method: str) -> Any:
    """Return vLLM's engine, its processes started by *method*: vLLM's CPU platform would spawn."""
    from loader.serve.vllm.private import (
        ReasoningParserManager,
        ToolParserManager,
        build_async_engine_client,
        validate_api_server_args,
    )

    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    validate_api_server_args(args)
    _allow_connections()

    def make(own: Callable[[], Any]) -> Any:
        os.environ[METHOD] = method
        return own()

    with process_context(make):
        return await stack.enter_async_context(build_async_engine_client(args))


def _allow_connections() -> None:
    """Let this process have as many connections as the machine grants it, up to ``_OPEN_FILES``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _warm_up(state: Any, args: Any, stage: Stage, canary: bool) -> None:
    """Send one request through everything a client's will meet, then time a first token."""
    base = (args.served_model_name or [args.model])[0]
    adapters = [lora_module.name for lora_module in args.lora_modules or ()]
    with stage("warm-up"):
        await _complete(state, {"model": base, "prompt": _PROMPT, "max_tokens": 1})
    with stage("first token"):
        await _complete(state, {"model": base, "prompt": _PROMPT, "max_tokens": 1})
    if canary and adapters:

        async def ask(name: str) -> Said:
            return read_said(await _complete(state, canary_body(name)))

        with stage("canary"):
            await check_adapters(ask, base, adapters)


async def _complete(state: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    from loader.serve.vllm.private import CompletionRequest, ErrorResponse

    answer = await state.openai_serving_completion.create_completion(CompletionRequest(**body))
    if isinstance(answer, ErrorResponse):
        raise RuntimeError(f"the first request was refused: {answer.error.message}")
    told: dict[str, Any] = answer.model_dump(mode="json")
    return told


def _go_on_telling(app: Any, drain: Drain) -> None:
    """Answer ``/status``, and give podloader's metrics to the registry that ``/metrics`` shows.

    Once *drain* has begun nothing else is answered.
    """
    from starlette.requests import Request
    from starlette.responses import Response

    from loader.status.metrics import BootCollector

    for path in STATUS_PATHS:

        async def status(asked: Request, path: str = path) -> Response:
            told = status_reply(path, asked.url.query, drain.boot)
            assert told is not None
            return Response(told.body, told.status, dict(told.headers), told.content_type)

        app.add_route(path, status, include_in_schema=False)
    BootCollector(lambda: drain.boot).register()
    # vLLM has built the stack already, which Starlette then lets nobody add to.
    app.middleware_stack = Refusing(app.middleware_stack or app.build_middleware_stack(), drain)


async def _serve_http(app: Any, listening: socket.socket, args: Any) -> Any:
    """Serve until a signal or the engine's end; return what is left to await after the engine."""
    from loader.serve.vllm.private import (
        VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        get_uvicorn_log_config,
        serve_http,
    )

    log_config = get_uvicorn_log_config(args)
    return await serve_http(
        app,
        sock=listening,
        enable_ssl_refresh=args.enable_ssl_refresh,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        # The engine has drained then, or was ended at its limit: no answer goes on any more.
        timeout_graceful_shutdown=_CLOSE_S,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        h11_max_header_count=args.h11_max_header_count,
        **({"log_config": log_config} if log_config else {}),
    )


async def _give_port_back(app: Any, channel: Channel) -> None:
    """Accept no more, which the pod does from now on, and answer those who were accepted.

    uvicorn's own end resets connections whose requests it has not read yet.
    """
    import asyncio

    channel.send("drained")
    for server in app.state.server.servers:
        server.close()
    await asyncio.sleep(_ACCEPTED_S)


def _exit_code(engine: Any) -> int:
    """Return 0 after an orderly end; after a crash what ended the engine, as a shell tells it."""
    code = crash_code(engine)
    if code is None:
        return 0
    return 128 - code if code < 0 else _ENGINE_DIED
