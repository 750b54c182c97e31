"""The adapters of a running vLLM, whichever way they come: with its start, by a request's name,
through ``/v1/load_lora_adapter`` or from the program.

Each time an adapter is taken up is a *version* of it, with a name, an id and a folder of its own
inside the engine. Requests find the newest under the name that they know; those under way keep the
weights that they began with, no cached block of the old ones serves the new, and nobody reads files
that a later fetch has changed. A version leaves the engine when nothing refers to it any more::

    requests say   "green"        models.lora_requests["green"] -> version
    engine knows   "green@7"      id 7, .../live/.../7/

(vLLM's own ``load_inplace`` changes weights under running requests, and reads the adapter again at
every step; its unload leaves the weights in the engine.) Source: vllm
``entrypoints/openai/models/serving.py``, ``lora/worker_manager.py``, ``v1/core/kv_cache_utils.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loader.adapters.effect import check_finite
from loader.errors import AdapterError, EngineError, RequestError
from loader.serve.canary import CANARY_TOKENS, PROMPT, Said, check_adapters
from loader.serve.vllm.adapter_files import AdapterFiles
from loader.types import ServedAdapter
from loader.weights.stored import WeightFiles, list_tensors, read_bytes

_VERSION = "@"  # no name of ours holds one
CLEAN_CACHE = "podloader_clean_cache"  # of AdapterWorker
_log = logging.getLogger("podloader")


def public_name(own: str) -> str:
    """Return what requests call the adapter that the engine calls *own*."""
    return own.partition(_VERSION)[0]


class EngineAdapters:
    """What the engine of ``models``, vLLM's ``OpenAIServingModels``, has of adapters.

    ``canary``: one that comes later must answer a prompt unlike the base. All coroutines belong to
    the engine's loop.
    """

    def __init__(
        self, models: Any, adapters: Sequence[ServedAdapter] = (), *, canary: bool
    ) -> None:
        self._models, self._canary = models, canary
        self._engine = models.engine_client
        self._loop = asyncio.get_running_loop()
        self._files = AdapterFiles()
        self._adapters = {adapter.name: adapter for adapter in adapters}
        self._tasks: set[asyncio.Task[None]] = set()
        for name, loaded in models.lora_requests.items():
            self.adopt(name, loaded.lora_name)
        served, self._show = models.model_name, models.show_available_models
        models.model_name = lambda lora_request=None: public_name(served(lora_request))
        models.show_available_models = self.show

    @property
    def adapters(self) -> tuple[ServedAdapter, ...]:
        """Those that requests can name now."""
        return tuple(self._adapters.values())

    async def show(self) -> Any:
        """Return vLLM's list of models with the names and folders that others know."""
        shown = await self._show()
        for card in shown.data:
            card.id = public_name(card.id)
            if card.id in self._adapters:
                card.root = str(self._adapters[card.id].path)
        return shown

    async def put(
        self, adapter: ServedAdapter, *, replace: bool = False, is_3d: bool = False
    ) -> None:
        """Serve *adapter* from now on. Those for one name are taken up in the order of their calls.

        Raises:
            RequestError: the name is the base's, or taken and ``replace`` is not set.
            AdapterError: the engine does not take it, or it changes nothing.
            EngineError: the engine does not run.
        """
        name = adapter.name
        async with self._models.lora_resolver_lock[name]:
            if self._models.is_base_model(name):
                raise RequestError(f"{name!r} is the base model", status=409, where=name)
            if name in self._models.lora_requests and not replace:
                raise RequestError(f"an adapter {name!r} is served already", status=409, where=name)
            version = await self._take_up(adapter, is_3d)
            self._models.lora_requests[name] = version
            self._adapters[name] = adapter

    def adopt(self, name: str, own: str = "") -> None:
        """Give what vLLM has taken up by itself as *name* files of its own, and the name *own*.

        Raises:
            DiskError: the disk refused.
        """
        loaded = self._models.lora_requests.get(name)
        if loaded is None or isinstance(loaded, version_type()):
            return
        number, path = loaded.lora_int_id, Path(loaded.lora_path)
        folder = self._files.keep(path, number)
        self._adapters.setdefault(name, ServedAdapter(name, path, 0))
        own = own or _own_name(name, number)
        version, _ = self._make_version(own, number, folder, loaded.is_3d_lora_weight)
        self._models.lora_requests[name] = version

    async def remove(self, name: str) -> None:
        """Serve the adapter *name* no more; requests under way are answered to their end.

        Raises:
            RequestError: there is none (404).
        """
        if self._models.lora_requests.pop(name, None) is None:
            raise RequestError(
                f"the model {name!r} does not exist", status=404, where="model", got=name
            )
        self._adapters.pop(name, None)

    def close(self) -> None:
        """Let go of files, once the engine has ended."""
        self._files.close()

    async def _take_up(self, adapter: ServedAdapter, is_3d: bool) -> Any:
        number = self._models.lora_id_counter.inc(1)
        folder = await asyncio.to_thread(self._files.keep, adapter.path, number)
        await asyncio.to_thread(_check_numbers, folder)
        version, leave = self._make_version(_own_name(adapter.name, number), number, folder, is_3d)
        try:
            await self._load(version, adapter.path)
            if self._canary:
                await self._prove(version)
        except BaseException:
            leave()  # whoever keeps the error would keep the version
            raise
        return version

    async def _load(self, version: Any, path: Path) -> None:
        try:
            await self._engine.add_lora(version)
        except Exception as error:
            if self._engine.errored:
                raise EngineError("the engine is not running", got=str(error)) from error
            raise AdapterError(
                "the engine does not take the adapter",
                where=str(path),
                got=str(error),
                next_step="engine_args max_lora_rank says what it can take",
            ) from error

    def _make_version(
        self, own: str, number: int, folder: Path, is_3d: bool
    ) -> tuple[Any, Callable[[], object]]:
        """Return the version, and what makes it leave the engine before its time."""
        version = version_type()(own, number, str(folder), is_3d_lora_weight=is_3d)
        # Whoever answers a request holds this object until its last token.
        gone = weakref.finalize(version, self._on_gone, own, number, folder)
        gone.atexit = False
        return version, gone

    def _on_gone(self, own: str, number: int, folder: Path) -> None:
        """Runs in whatever thread let go of the last reference."""

        def begin() -> None:
            task = self._loop.create_task(self._forget(own, number, folder))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(begin)

    async def _forget(self, own: str, number: int, folder: Path) -> None:
        try:
            await self._engine.remove_lora(number)
        except Exception as error:
            _log.debug("adapter %s leaves an engine that does not answer: %s", own, error)
            return
        shutil.rmtree(folder, ignore_errors=True)
        _log.info("adapter %s has left the engine", own)

    async def _prove(self, loaded: Any) -> None:
        """Raise AdapterError where *loaded* answers as the base does, or with no numbers."""
        if "generate" not in await self._engine.get_supported_tasks():
            return
        name = public_name(loaded.lora_name)

        async def ask(asked: str) -> Said:
            return await _say(self._engine, loaded if asked == name else None)

        try:
            await check_adapters(ask, "", [name])
        except AdapterError:
            with contextlib.suppress(Exception):  # vLLM's own server has another worker
                await self._engine.collective_rpc(CLEAN_CACHE)
            raise


def _check_numbers(folder: Path) -> None:
    """Raise AdapterError before an engine computes with NaN: what others compute then has it, too,
    by blocks of the cache that are used again.
    """
    weights = folder / "adapter_model.safetensors"
    if weights.is_file():
        stored = list_tensors(WeightFiles((weights,), pickled=False))
        tensors = {name: tensor.info for name, tensor in stored.items()}
        check_finite(folder, tensors, lambda name: read_bytes(stored[name]))


def _own_name(name: str, number: int) -> str:
    return f"{name}{_VERSION}{number}"


@functools.cache
def version_type() -> Any:
    """Return vLLM's ``LoRARequest`` as something whose end can be watched."""
    from loader.serve.vllm.private import LoRARequest

    class Version(LoRARequest, weakref=True):  # type: ignore[misc, call-arg]
        pass

    return Version


async def _say(engine: Any, version: Any) -> Said:
    """Return what the canary prompt is answered with; *version* is None for the base."""
    from loader.serve.vllm.private import SamplingParams

    salt = secrets.token_hex(8)
    params = SamplingParams(max_tokens=CANARY_TOKENS, temperature=0, ignore_eos=True, logprobs=0)
    prompt = {"prompt": PROMPT, "cache_salt": salt}
    answers = engine.generate(prompt, params, f"canary-{salt}", lora_request=version)
    last = [answer async for answer in answers][-1].outputs[0]
    found = zip(last.token_ids, last.logprobs, strict=True)
    return Said(
        tuple(map(str, last.token_ids)), tuple(values[token].logprob for token, values in found)
    )
