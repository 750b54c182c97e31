"""Adapters that requests to vLLM's server bring: by name on first use, and by path.

``/v1/load_lora_adapter`` takes, as ``lora_path``, ``<job>/<checkpoint>``, which is fetched, or a
folder below the download folder; vLLM alone would take any path of the machine, or a model of the
Hub. What is refused is refused with one reason, however it was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from loader.errors import (
    AdapterError,
    CheckpointError,
    DeniedError,
    FetchError,
    ListingError,
    LoaderError,
    RequestError,
    ResolveError,
)
from loader.serve.vllm.engine_adapters import EngineAdapters
from loader.types import ServedAdapter

_T = TypeVar("_T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*(/[A-Za-z0-9_][A-Za-z0-9._=-]*)*")
_LONGEST_NAME = 200
_NOT_FOUND, _PASSING = 404, 503
_REFUSED_S = 30.0  # what was refused is not asked for at the origin again before
_PAUSE_S = 5.0  # nor what may succeed the next time
_MOST_REFUSED = 10_000
_WORKERS = 32  # of one job at a time: they wait for its origin, each for another adapter
_loading: WeakKeyDictionary[Any, LoadedOnRequest] = WeakKeyDictionary()
_log = logging.getLogger("podloader")


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Where requests may have adapters from: the jobs *jobs*, and folders below *root*.

    *fetch* returns the adapter of the name ``<job>/<checkpoint>`` for the base in that folder, and
    *check* the one in a folder, by the name that it is to have. Both raise LoaderError.
    """

    jobs: Collection[str]
    root: Path
    fetch: Callable[[str, str], ServedAdapter]
    check: Callable[[str, Path, str], ServedAdapter]


class Adapters:
    """What *source* gives, on a bounded number of threads for each job."""

    def __init__(self, source: AdapterSource) -> None:
        self._source, self._root = source, source.root.absolute()
        self._refused: dict[str, tuple[float, LoaderError]] = {}
        self._turns: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(_WORKERS))

    def may_fetch(self, name: str) -> bool:
        """Return whether *name* is of a job that is allowed."""
        return name.partition("/")[0] in self._source.jobs

    async def find(self, base: str, name: str) -> ServedAdapter:
        """Return the adapter *name*, fetched.

        Raises:
            LoaderError: it is not to be had.
        """
        if not self.may_fetch(name):
            return self._source.fetch(base, name)  # which refuses it
        async with self._turns[name.partition("/")[0]]:  # in the order of asking
            return await _on_thread(self._source.fetch, base, name)

    async def locate(self, base: str, path: str, name: str, *, ours: bool = False) -> ServedAdapter:
        """Return the adapter that ``lora_path`` means; with *ours* it is known to be allowed.

        Raises:
            LoaderError: it is neither an adapter that may be fetched nor a folder of ours.
        """
        if not ours and not path.startswith(("/", ".", "~")):
            return await self.find(base, path)
        folder = Path(path).resolve()
        ours = ours or folder.is_relative_to(self._root.resolve())
        if not ours or not folder.is_dir():
            raise AdapterError(
                "lora_path leads out of the download folder",
                expected="<job>/<checkpoint>, or a folder below the download folder",
                got=path[:_LONGEST_NAME],
            )
        return await _on_thread(self._source.check, base, folder, name)

    @contextlib.contextmanager
    def asked(self, what: str) -> Iterator[None]:
        """Do the block; what it was refused with, it is refused with again for a while.

        Raises:
            LoaderError: of the block, or of the one before.
        """
        until, error = self._refused.get(what, (0.0, None))
        if error is not None and time.monotonic() < until:
            raise error.with_traceback(None)
        try:
            yield
        except LoaderError as problem:
            self._remember(what, problem)
            # What is kept must not keep all that stood on the stack.
            problem.__cause__ = problem.__context__ = None
            raise problem.with_traceback(None) from None
        except Exception as problem:
            _log.exception("the adapter %r is not to be had", what[:_LONGEST_NAME])
            raise LoaderError(f"{type(problem).__name__}: {problem}") from problem
        self._refused.pop(what, None)

    def _remember(self, what: str, problem: LoaderError) -> None:
        _log.warning("the adapter %r is not to be had: %s", what[:_LONGEST_NAME], problem)
        status = status_of(problem)
        if isinstance(problem, RequestError) and status != _NOT_FOUND:
            return  # of the request, not of the adapter
        if len(self._refused) >= _MOST_REFUSED:
            self._refused.clear()
        pause_s = _PAUSE_S if status == _PASSING else _REFUSED_S
        self._refused[what] = (time.monotonic() + pause_s, problem)


async def _on_thread(function: Callable[..., _T], *arguments: Any) -> _T:
    """Return what *function* does, from a thread that not even the end of the process waits for."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def end(set_: Callable[[Any], None], value: object) -> None:
        if not done.cancelled():
            set_(value)

    def work() -> None:
        try:
            outcome = (done.set_result, function(*arguments))
        except BaseException as error:
            outcome = (done.set_exception, error)  # type: ignore[assignment]
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(end, *outcome)

    threading.Thread(target=work, name="adapter", daemon=True).start()
    return await done


def check_name(name: str) -> None:
    """Raise RequestError for an adapter's name that could mean something else somewhere."""
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
        raise RequestError(
            "not a name for an adapter",
            where="lora_name",
            expected="letters, digits and ._=- in parts between slashes",
            got=name[:_LONGEST_NAME],
        )


def status_of(error: LoaderError) -> int:
    """Return the HTTP status of *error*; 503 is what may succeed the next time."""
    match error:
        case RequestError():
            return error.status
        case ResolveError():
            return _NOT_FOUND
        case CheckpointError():
            return 400
        case DeniedError():
            return 502
        case FetchError() | ListingError():
            return _PASSING
    return 500


def install(source: AdapterSource, *, canary: bool) -> None:
    """Teach the vLLM server of this process; a second call changes nothing."""
    from loader.serve.vllm.private import OpenAIServingModels

    own = OpenAIServingModels.init_static_loras
    if own.__module__ == __name__:
        return

    async def init_static_loras(self: Any) -> None:
        await own(self)
        take_loading_over(self, canary, Adapters(source))

    OpenAIServingModels.init_static_loras = init_static_loras


def take_loading_over(
    models: Any, canary: bool, adapters: Adapters | None = None
) -> LoadedOnRequest:
    """Return what loads and unloads for ``models``, made the first time."""
    if models not in _loading:
        _loading[models] = LoadedOnRequest(models, adapters, canary=canary)
    return _loading[models]


class LoadedOnRequest:
    """Takes the place of the methods by which vLLM's ``OpenAIServingModels`` loads and unloads.

    Without *adapters* all that vLLM itself would take is allowed.
    """

    def __init__(self, models: Any, adapters: Adapters | None, *, canary: bool) -> None:
        self._models, self._adapters = models, adapters
        self._versions = EngineAdapters(models, canary=canary)
        self._base = models.model_config.model
        self._resolve_elsewhere = models.resolve_lora
        self._under_way: dict[str, asyncio.Task[Any]] = {}
        self._at_the_start = {
            (lora_module.name, lora_module.path) for lora_module in models.static_lora_modules or ()
        }
        models.load_lora_adapter = self.load
        models.unload_lora_adapter = self.unload
        models.resolve_lora = self.resolve

    async def resolve(self, name: str) -> Any:
        """Return the version of the adapter *name*, fetched where it is not served yet."""
        from fastapi import HTTPException

        task = self._under_way.get(name)
        if task is None:
            task = self._under_way[name] = asyncio.create_task(self._bring(name))
            task.add_done_callback(lambda _: self._under_way.pop(name))
        try:
            refusal = await asyncio.shield(task)  # whoever asks first may go away
        except LoaderError as error:
            raise HTTPException(status_of(error), error.line) from None
        return self._models.lora_requests.get(name) or refusal

    async def load(self, request: Any, base_model_name: str | None = None) -> Any:
        """Answer ``/v1/load_lora_adapter``."""
        name, path = request.lora_name, request.lora_path
        try:
            if self._adapters is None:
                await self._put(request, await _find_anywhere(name, path))
            else:
                check_name(name)
                ours = (name, path) in self._at_the_start
                with self._adapters.asked(path):
                    found = await self._adapters.locate(self._base, path, name, ours=ours)
                    await self._put(request, found)
        except LoaderError as error:
            return _refusal(error)
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload(self, request: Any) -> Any:
        """Answer ``/v1/unload_lora_adapter``."""
        try:
            await self._versions.remove(request.lora_name)
        except LoaderError as error:
            return _refusal(error)
        return f"Success: LoRA adapter '{request.lora_name}' removed successfully."

    def close(self) -> None:
        """Let go of the adapters' files, once the engine has ended."""
        self._versions.close()

    async def _put(self, request: Any, found: ServedAdapter) -> None:
        await self._versions.put(
            replace(found, name=request.lora_name),
            replace=request.load_inplace,
            is_3d=request.is_3d_lora_weight,
        )

    async def _bring(self, name: str) -> Any:
        """Serve the adapter *name*; returns what other resolvers of vLLM's answer, if any."""
        adapters = self._adapters
        if adapters is None or (self._models.lora_resolvers and not adapters.may_fetch(name)):
            answer = await self._resolve_elsewhere(name)
            self._versions.adopt(name)
            return answer
        with adapters.asked(name):
            found = await adapters.find(self._base, name)
            if name not in self._models.lora_requests:
                await self._versions.put(found)
        return None


async def _find_anywhere(name: str, path: str) -> ServedAdapter:
    """Return what vLLM itself takes *path* for: a folder, or a repository of the Hub."""
    from loader.serve.vllm.private import get_adapter_absolute_path

    return ServedAdapter(name, Path(await _on_thread(get_adapter_absolute_path, path)), 0)


def _refusal(error: LoaderError) -> Any:
    from loader.serve.vllm.private import create_error_response

    status = HTTPStatus(status_of(error))
    if status is HTTPStatus.CONFLICT:
        status = HTTPStatus.BAD_REQUEST  # as vLLM answers
    return create_error_response(error.line, status.phrase, status)
