"""vLLM in this process: its async engine under its own OpenAI serving layer."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loader.errors import EngineError, LoaderError, RequestError
from loader.json_text import parse_json
from loader.serve.canary import Said, canary_body, check_adapters, read_said
from loader.serve.model import base_name, ready_folder
from loader.serve.request_body import PROMPTS, check_request
from loader.serve.vllm.arguments import (
    check_engine_args,
    parse_arguments,
    serve_arguments,
)
from loader.serve.vllm.caches import warn_unwritable_cache
from loader.serve.vllm.engine_adapters import EngineAdapters
from loader.serve.vllm.failures import import_failure, start_failure
from loader.serve.vllm.forkserver import METHOD, forked_engine, start_forkserver
from loader.serve.vllm.loop import LoopThread
from loader.serve.vllm.orphans import OrphanGuard
from loader.serve.vllm.private import close_sockets
from loader.serve.vllm.releases import warn_unproved
from loader.serve.vllm.tasks import check_sound, embed, transcribe
from loader.types import ReadyModel, ServedAdapter

CORE = "EngineCore"  # what vLLM calls the process that it starts
_SHOWN_ERRORS = 5  # a body that is wrong in every element would be answered with a book


@dataclass(frozen=True, slots=True)
class _Running:
    """The engine, vLLM's application state, and the loop that both belong to."""

    loop: LoopThread
    engine: Any
    state: Any
    stack: AsyncExitStack
    guard: OrphanGuard
    adapters: EngineAdapters


class VLLMModel:
    """A model folder and its adapters, answered by vLLM inside this process.

    ``engine_args`` are named as vLLM's ``AsyncEngineArgs``. ``served_model_name`` is what requests
    call the base or merged model, by default its folder's name; adapters keep their own names.
    ``canary``: before ``load`` returns, every adapter must answer a prompt unlike the base.
    """

    def __init__(
        self,
        ready: ReadyModel | Path | str,
        *,
        engine_args: Mapping[str, object] | None = None,
        served_model_name: str | None = None,
        trust_remote_code: bool = False,
        canary: bool = True,
        load_format: str | None = None,
    ) -> None:
        self._canary = canary
        self._ready = ready if isinstance(ready, ReadyModel) else ready_folder(Path(ready))
        self._engine_args = dict(engine_args or {})
        self._base = base_name(self._ready, served_model_name)
        self._arguments = serve_arguments(
            self._ready,
            self._engine_args,
            served_model_name=served_model_name,
            trust_remote_code=trust_remote_code,
            load_format=load_format,
        )
        self._lock = threading.Lock()
        self._running: _Running | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a request's ``model`` may give, the base's first."""
        return (self._base, *(adapter.name for adapter in self.adapters))

    @property
    def adapters(self) -> tuple[ServedAdapter, ...]:
        """The adapters that requests can name now."""
        running = self._running
        return running.adapters.adapters if running else self._ready.adapters

    def add_adapter(self, adapter: ServedAdapter, *, replace: bool = False) -> None:
        """Serve one more adapter, or with ``replace`` another one under a name that is served.

        No request is dropped: those under way are answered by what they began with. The engine
        must have been started with adapters, or with ``max_loras`` in ``engine_args``.

        Raises:
            RequestError: the name is served already (409).
            AdapterError: the engine does not take it, or it changes nothing.
            EngineError: the engine is not running.
        """
        running = self._alive()
        running.loop.call(running.adapters.put(adapter, replace=replace))

    def remove_adapter(self, name: str) -> None:
        """Serve the adapter *name* no more; requests under way are answered to their end.

        Raises:
            RequestError: there is none (404).
            EngineError: the engine is not running.
        """
        running = self._alive()
        running.loop.call(running.adapters.remove(name))

    def load(self) -> None:
        """Start the engine; nothing while it is healthy, anew once it is dead. In any thread.

        Raises:
            ConfigError: ``engine_args`` that vLLM does not know or refuses.
            EngineError: vLLM did not start.
            AdapterError: an adapter changes nothing.
        """
        with self._lock:
            if self.is_healthy():
                return
            dead, self._running = self._running, None
            if dead is not None:
                _stop(dead)
            running = self._start()
            try:
                if self._canary:
                    names = [adapter.name for adapter in self._ready.adapters]
                    running.loop.call(self._check_adapters(running.state, names))
            except BaseException:
                _stop(running)
                raise
            self._running = running

    async def predict(self, request: Mapping[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        """Return vLLM's answer to an OpenAI body: chat, completions, embeddings, transcription.

        Which it is, is told by what it holds: ``messages``, ``prompt``, ``input`` or ``file``, a
        sound file in base64.
        With ``stream: true`` it is an async generator of server-sent events, each a whole
        ``data: …`` line and the blank one after it. Closing it, or cancelling the call, makes vLLM
        drop the request.

        Raises:
            RequestError: the body is wrong, with vLLM's message and HTTP status.
            EngineError: the engine is not running or failed.
        """
        running = self._alive()
        names = [adapter.name for adapter in self.adapters]
        body = check_request(request, base=self._base, adapters=names, known=PROMPTS)
        answer = await running.loop.run(_answer(running.state, body))
        return answer if isinstance(answer, dict) else running.loop.stream(answer)

    def is_healthy(self) -> bool:
        """Return whether the engine is loaded and its processes live."""
        running = self._running
        return running is not None and running.loop.alive and not running.engine.errored

    def close(self) -> None:
        """Stop the engine's processes; requests under way fail. A second call does nothing."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            _stop(running)

    def _alive(self) -> _Running:
        running = self._running
        if running is None or not running.loop.alive:
            raise EngineError("the engine is not running", next_step="call load() first")
        return running

    async def _check_adapters(self, state: Any, names: Sequence[str]) -> None:
        async def ask(name: str) -> Said:
            answer = await _answer(state, canary_body(name))
            assert isinstance(answer, dict)
            return read_said(answer)

        generates = getattr(state, "openai_serving_completion", None) is not None
        if generates:
            await check_adapters(ask, self._base, names)

    def _start(self) -> _Running:
        start_forkserver()
        # As vLLM's own command line does: a fork of a process that already runs threads (Truss's
        # server, torch's OpenMP after a merge) can hang in the child.
        os.environ.setdefault(METHOD, "spawn")
        try:
            import uvloop
            import vllm  # noqa: F401
        except ImportError as error:
            raise import_failure(error) from error
        warn_unproved()
        warn_unwritable_cache()
        check_engine_args(self._engine_args)
        check_sound(self._ready.path)
        args = parse_arguments(self._arguments)
        loop = LoopThread("vllm", uvloop.new_event_loop)
        try:
            with forked_engine(args):
                return loop.call(_start_engine(loop, args, self._ready.adapters, self._canary))
        except LoaderError:
            loop.close()
            raise
        except Exception as error:
            loop.close()
            raise start_failure(error, str(self._ready.path), vars(args)) from error


def _stop(running: _Running) -> None:
    running.loop.call(running.stack.aclose())
    running.loop.close()
    running.guard.close()
    running.adapters.close()


async def _start_engine(
    loop: LoopThread, args: Any, served: Sequence[ServedAdapter], canary: bool
) -> _Running:
    from starlette.datastructures import State

    from loader.serve.vllm.private import build_async_engine_client, init_app_state

    async with AsyncExitStack() as stack:
        sockets = stack.enter_context(ExitStack())  # closed after the engine itself
        engine = await stack.enter_async_context(build_async_engine_client(args))
        sockets.callback(close_sockets, engine)
        state = State()
        await init_app_state(engine, state, args, await engine.get_supported_tasks())
        models = state.openai_serving_models
        adapters = EngineAdapters(models, served, canary=canary)
        return _Running(loop, engine, state, stack.pop_all(), OrphanGuard(CORE), adapters)
    raise AssertionError("unreachable")


async def _answer(state: Any, body: dict[str, Any]) -> dict[str, Any] | AsyncGenerator[str, None]:
    """Return what vLLM's handler for *body* returns, on the engine's loop."""
    from pydantic import BaseModel, ValidationError

    from loader.serve.vllm.private import ErrorResponse

    try:
        if body.get("input") is not None:
            return await embed(state, body)
        if body.get("file") is not None:
            result = await transcribe(state, body)
        else:
            result = await _generate(state, body)
    except ValidationError as error:
        raise _refuse_body(error) from None
    except LoaderError:
        raise
    except Exception as error:
        raise _translate(error) from error
    if isinstance(result, ErrorResponse):
        raise _refuse_or_fail(result.error.message, result.error.code)
    if isinstance(result, BaseModel):
        return result.model_dump(mode="json")
    return await _begin(result)


async def _generate(state: Any, body: dict[str, Any]) -> Any:
    from loader.serve.vllm.private import ChatCompletionRequest, CompletionRequest

    chat = body.get("messages") is not None
    name = "openai_serving_chat" if chat else "openai_serving_completion"
    handler = getattr(state, name, None)
    if handler is None:
        raise RequestError("the model does not generate text", status=501)
    if chat:
        return await handler.create_chat_completion(ChatCompletionRequest(**body))
    return await handler.create_completion(CompletionRequest(**body))


async def _begin(stream: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """Return *stream* once its first event is there and is no error.

    vLLM checks part of a request only as it starts to generate; its own server has sent status 200
    by then.
    """
    first = await anext(stream, "")
    if first.startswith('data: {"error"'):
        error = parse_json(first.removeprefix("data: "))["error"]
        raise _refuse_or_fail(error["message"], error["code"])
    return _resume(first, stream)


async def _resume(first: str, rest: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    try:
        yield first
        async for event in rest:
            yield event
    finally:
        await rest.aclose()


def _refuse_body(error: Any) -> RequestError:
    found = error.errors(include_url=False, include_input=False)
    lines = [f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in found[:_SHOWN_ERRORS]]
    more = len(found) - len(lines)
    return RequestError("; ".join(lines) + (f"; and {more} more" if more else ""))


def _translate(error: Exception) -> LoaderError:
    """Return our error for one of vLLM's, by the status that its own server would answer with."""
    from loader.serve.vllm.private import create_error_response

    refused = create_error_response(error)
    return _refuse_or_fail(refused.error.message, refused.error.code)


def _refuse_or_fail(message: str, status: int) -> LoaderError:
    if status != 500:
        return RequestError(message, status=status)
    return EngineError(
        "the engine failed while answering",
        got=message,
        next_step="the engine's log lines name the cause; is_healthy tells whether it lives",
    )
