"""Adapters in vLLM's own server: fetched on first use, and loaded from nowhere but our folders.

Taught to vLLM in its server's process, before it serves: a ``LoRAResolver`` for requests that name
an adapter which is not loaded, and checks around what ``/v1/load_lora_adapter`` takes. There,
``lora_path`` is ``<job>/<checkpoint>``, which is fetched, or a folder below the download folder;
vLLM alone would take any path of the machine, or a model of the Hub. ``load_inplace`` gives the
name to another version instead of changing weights under running requests
(``loader.serve.vllm.engine_adapters``).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loader.errors import AdapterError, LoaderError, RequestError
from loader.serve.vllm.engine_adapters import public_name, version_name
from loader.types import ServedAdapter

Fetch = Callable[[str, str], ServedAdapter]
"""Returns the adapter of the name ``<job>/<checkpoint>``, for the base in that folder."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*(/[A-Za-z0-9_][A-Za-z0-9._=-]*)*")
_LONGEST_NAME = 200
_REFUSED_S = 30.0  # a name that was refused is not asked for at the origin again before
_MOST_REFUSED = 10_000
_log = logging.getLogger("podloader")


class Adapters:
    """What requests may load: by name through *fetch*, by path below *root*."""

    def __init__(self, fetch: Fetch, root: Path) -> None:
        self._fetch, self._root = fetch, root.absolute()
        self._refused: dict[str, tuple[float, LoaderError]] = {}

    async def find(self, base: str, name: str) -> ServedAdapter:
        """Return the adapter *name*, fetched.

        Raises:
            LoaderError: it is not to be had; the same error for a while.
        """
        until, error = self._refused.get(name, (0.0, None))
        if error is not None and time.monotonic() < until:
            raise error
        try:
            found = await asyncio.to_thread(self._fetch, base, name)
        except LoaderError as problem:
            _log.warning("the adapter %r is not to be had: %s", name[:_LONGEST_NAME], problem)
            if len(self._refused) >= _MOST_REFUSED:
                self._refused.clear()
            self._refused[name] = (time.monotonic() + _REFUSED_S, problem)
            raise
        self._refused.pop(name, None)
        return found

    async def locate(self, base: str, path: str) -> Path:
        """Return the folder that ``lora_path`` means.

        Raises:
            LoaderError: it is neither an adapter that may be fetched nor a folder of ours.
        """
        if not path.startswith(("/", ".", "~")):
            return (await self.find(base, path)).path
        folder = Path(path).resolve()
        if not folder.is_relative_to(self._root.resolve()) or not folder.is_dir():
            raise AdapterError(
                "lora_path leads out of the download folder",
                expected="<job>/<checkpoint>, or a folder below the download folder",
                got=path[:_LONGEST_NAME],
            )
        return folder


def check_name(name: str) -> None:
    """Raise RequestError for an adapter's name that could mean something else somewhere."""
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
        raise RequestError(
            "not a name for an adapter",
            where="lora_name",
            expected="letters, digits and ._=- in parts between slashes",
            got=name[:_LONGEST_NAME],
        )


def install(fetch: Fetch, root: Path) -> None:
    """Teach the vLLM of this process; a second call changes nothing."""
    from loader.serve.vllm.private import LoRAResolverRegistry, OpenAIServingModels

    if "podloader" in LoRAResolverRegistry.get_supported_resolvers():
        return
    adapters = Adapters(fetch, root)
    LoRAResolverRegistry.register_resolver("podloader", _make_resolver(adapters))
    _guard(OpenAIServingModels, adapters)


def _make_resolver(adapters: Adapters) -> Any:
    from loader.serve.vllm.private import LoRARequest, LoRAResolver

    class CheckpointResolver(LoRAResolver):  # type: ignore[misc]
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            try:
                found = await adapters.find(base_model_name, lora_name)
            except LoaderError:
                return None  # vLLM answers 404; the log says why
            return LoRARequest(lora_name, 1, str(found.path))  # vLLM gives it an id of its own

    return CheckpointResolver()


def _guard(serving: Any, adapters: Adapters) -> None:
    """Put checks and versions around the methods of vLLM's ``OpenAIServingModels``."""
    load, name_of = serving.load_lora_adapter, serving.model_name
    show = serving.show_available_models

    async def load_checked(models: Any, request: Any, base_model_name: str | None = None) -> Any:
        from loader.serve.vllm.private import create_error_response

        static = models.static_lora_modules or ()
        ours = {(lora_module.name, lora_module.path) for lora_module in static}
        if (request.lora_name, request.lora_path) in ours and not request.load_inplace:
            return await load(models, request, base_model_name)
        try:
            check_name(request.lora_name)
            path = await adapters.locate(models.model_config.model, request.lora_path)
        except LoaderError as error:
            message = "; ".join(filter(None, [error.what, error.got]))
            return create_error_response(message)
        checked = request.model_copy(update={"lora_path": str(path)})
        if request.load_inplace and request.lora_name in models.lora_requests:
            return await _replace(models, load, checked, base_model_name)
        plain = checked.model_copy(update={"load_inplace": False})
        return await load(models, plain, base_model_name)

    async def show_public(models: Any) -> Any:
        shown = await show(models)
        for card in shown.data:
            card.id = public_name(card.id)
        return shown

    serving.load_lora_adapter = load_checked
    serving.model_name = lambda models, lora_request=None: public_name(
        name_of(models, lora_request)
    )
    serving.show_available_models = show_public


async def _replace(models: Any, load: Any, request: Any, base_model_name: str | None) -> Any:
    """Load another version beside the one that is served, then give the name to it."""
    name = request.lora_name
    own = version_name(name, models.lora_id_counter.inc(1))
    fresh = request.model_copy(update={"lora_name": own, "load_inplace": False})
    answer = await load(models, fresh, base_model_name)
    if not isinstance(answer, str):
        return answer
    # Requests under way hold the old version themselves; vLLM drops it when it needs the room.
    models.lora_requests[name] = models.lora_requests.pop(own)
    return f"Success: LoRA adapter '{name}' replaced successfully."
