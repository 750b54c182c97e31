"""The adapters of a running vLLM: added, replaced and removed between its requests.

Each version of an adapter has a name and an id of its own inside the engine, ``<name>@<n>`` from
the second on: requests under way keep the weights that they began with, and no cached block of the
old ones serves the new. (vLLM's own ``load_inplace`` changes weights under running requests, and
reads the adapter again at every step.) Source: vllm ``entrypoints/openai/models/serving.py``,
``lora/worker_manager.py``, ``v1/core/kv_cache_utils.py``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from loader.errors import AdapterError, RequestError
from loader.types import ServedAdapter

_VERSION = "@"  # no name of ours holds one
_log = logging.getLogger("podloader")


def public_name(own: str) -> str:
    """Return what requests call the adapter that the engine calls *own*."""
    return own.partition(_VERSION)[0]


def version_name(name: str, version: int) -> str:
    """Return what the engine calls a later version of the adapter *name*."""
    return f"{name}{_VERSION}{version}"


class EngineAdapters:
    """What the engine has of adapters. All coroutines belong to the engine's loop.

    ``models`` is vLLM's ``OpenAIServingModels``. ``room``: how many versions may be in the engine
    at a time, None where vLLM itself makes room.
    """

    def __init__(
        self, engine: Any, models: Any, adapters: Mapping[str, ServedAdapter], room: int | None
    ) -> None:
        self._engine, self._models, self._room = engine, models, room
        self._adapters = dict(adapters)
        self._own = {name: name for name in adapters}
        self._versions = Counter(adapters.keys())
        self._under_way: Counter[str] = Counter()
        self._retired: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()
        served = models.model_name
        models.model_name = lambda lora_request=None: public_name(served(lora_request))

    @property
    def adapters(self) -> tuple[ServedAdapter, ...]:
        """Those that requests can name now."""
        return tuple(self._adapters.values())

    async def put(
        self, adapter: ServedAdapter, prove: Callable[[str], Awaitable[None]], *, replace: bool
    ) -> None:
        """Serve *adapter* from now on; ``prove`` is called with the engine's name for it before.

        Raises:
            RequestError: the name is taken and ``replace`` is not set.
            AdapterError: the engine has no room for it or does not take it, or ``prove`` says so.
        """
        from loader.serve.vllm.private import ErrorResponse, LoadLoRAAdapterRequest

        async with self._lock:
            before = self._own.get(adapter.name)
            if before is not None and not replace:
                raise RequestError(
                    f"an adapter {adapter.name!r} is served already", status=409, where=adapter.name
                )
            self._check_room(adapter)
            self._versions[adapter.name] += 1
            own = adapter.name
            if self._versions[own] > 1:
                own = version_name(own, self._versions[own])
            request = LoadLoRAAdapterRequest(lora_name=own, lora_path=str(adapter.path))
            answer = await self._models.load_lora_adapter(request)
            if isinstance(answer, ErrorResponse):
                raise AdapterError(
                    "the engine does not take the adapter",
                    where=str(adapter.path),
                    got=answer.error.message,
                    next_step="engine_args max_loras and max_lora_rank say what it can take",
                )
            try:
                await prove(own)
            except BaseException:
                await self._forget(own)
                raise
            self._own[adapter.name], self._adapters[adapter.name] = own, adapter
            if before is not None:
                await self._retire(before)

    async def remove(self, name: str) -> None:
        """Serve the adapter *name* no more; requests under way are answered to their end.

        Raises:
            RequestError: there is none (404).
        """
        async with self._lock:
            if name not in self._own:
                raise _absent(name)
            del self._adapters[name]
            await self._retire(self._own.pop(name))

    def take(self, name: str) -> str:
        """Return the engine's name for the adapter *name*, kept until it is given to ``release``.

        Raises:
            RequestError: there is none (404).
        """
        if name not in self._own:
            raise _absent(name)
        own = self._own[name]
        self._under_way[own] += 1
        return own

    def release(self, own: str) -> None:
        """Say that a request is over."""
        self._under_way[own] -= 1
        if not self._under_way[own]:
            del self._under_way[own]
            if own in self._retired:
                task = asyncio.get_running_loop().create_task(self._forget(own))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def release_after(
        self, own: str, events: AsyncGenerator[str, None]
    ) -> AsyncGenerator[str, None]:
        """Return *events*; the request is over when they are, or when they are closed."""
        try:
            async for event in events:
                yield event
        finally:
            self.release(own)
            await events.aclose()

    def _check_room(self, adapter: ServedAdapter) -> None:
        live = len(self._own) + len(self._retired)
        if self._room is not None and live >= self._room:
            raise AdapterError(
                "the engine has no room for another adapter",
                where=adapter.name,
                expected=f"at most {self._room} at a time, one that is being replaced included",
                got=f"{live} are there",
                next_step="raise engine_args max_loras, or remove an adapter first",
            )

    async def _retire(self, own: str) -> None:
        self._retired.add(own)
        if not self._under_way[own]:
            await self._forget(own)

    async def _forget(self, own: str) -> None:
        loaded = self._models.lora_requests.pop(own, None)
        if loaded is not None:
            await self._engine.remove_lora(loaded.lora_int_id)
        self._retired.discard(own)
        _log.info("adapter %s has left the engine", own)


def _absent(name: str) -> RequestError:
    return RequestError(f"the model {name!r} does not exist", status=404, where="model", got=name)
