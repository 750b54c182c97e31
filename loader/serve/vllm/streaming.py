"""A model that vLLM loads while its weights arrive, and what its start needs beyond files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loader.arriving.feed import Feed, Taken
from loader.arriving.filling import FillingFolder
from loader.arriving.standins import EnginePath
from loader.errors import ConfigError, DiskError, EngineError
from loader.serve.model import base_name
from loader.types import STREAM_VARIABLE, ReadyModel
from loader.units import show_seconds

LOAD_FORMAT = "podloader"
READY_TIMEOUT = "VLLM_ENGINE_READY_TIMEOUT_S"
# Of vLLM's whole start, the weights' arrival included: whether that goes on, the fetch decides. It
# is in the key of vLLM's compiled code, so it is the same in every start.
_READY_TIMEOUT_S = 7 * 24 * 3600
_OWN_READY_TIMEOUT_S = 600.0  # vLLM's default
_PLUGINS, _PLUGIN = "VLLM_PLUGINS", "podloader"
# What says by itself how weights are read, and what reads them on other machines.
_OTHERWISE = ("load_format", "model_loader_extra_config", "config", "nnodes")


class Stream:
    """The model *ready*, whose weights *filling* brings, at the path of an engine in *cache*.

    ``ready`` is what the engine is given. *taken* is told as by ``Feed``.

    Raises:
        ConfigError: what requests are to call it is not known yet.
        DiskError: the disk refused.
        OSError: there are no sockets.
    """

    def __init__(
        self,
        cache: Path,
        filling: FillingFolder,
        ready: ReadyModel,
        served_model_name: str | None,
        taken: Taken,
    ) -> None:
        self._name = served_model_name
        if not served_model_name and "name" not in ready.provenance and _has_no_name(ready.path):
            raise ConfigError(
                "the model has no name before all of it is here",
                where=str(ready.path),
                next_step="set served_model_name to have its weights streamed",
            )
        self._at = EnginePath.take(cache)
        try:
            self._at.stand_in(filling)
            self.ready = self._lead(ready)
            self.feed = Feed(filling, self._at.feed, taken)
        except BaseException:
            self._at.release()
            raise

    def publish(self, ready: ReadyModel) -> str:
        """Let the engine's path lead to *ready*, all of which is proved.

        Return why the engine cannot serve it all the same; empty where it can.
        """
        found, given = self._lead(ready), self.ready
        names = (base_name(found, self._name), base_name(given, self._name))
        if replace(found, provenance={}) != replace(given, provenance={}) or len(set(names)) > 1:
            return "the model is another than was announced"
        try:
            self._at.publish(ready.path)
        except DiskError as error:
            return f"{error.what}: {error.got}"
        return ""

    def finish(self) -> None:
        """Remove what the engine needs no more, which has all weights."""
        self.feed.close()
        self._at.clear()

    def close(self) -> None:
        """Remove all of it: the engine is gone."""
        self.feed.close()
        self._at.release()

    def _lead(self, ready: ReadyModel) -> ReadyModel:
        path = self._at.path
        return replace(
            ready,
            path=path,
            tokenizer=path if ready.tokenizer == ready.path else ready.tokenizer,
            provenance=ready.provenance | {"name": base_name(ready, None)},
        )


def _has_no_name(path: Path) -> bool:
    """Return whether a folder will have another name when it is complete."""
    return any(part.endswith(".partial") for part in path.parts)


def why_not_streamed(
    engine_start: str, engine_args: Mapping[str, object], given: Sequence[str] = ()
) -> str:
    """Return why vLLM, so started, takes its weights from files; empty where it need not.

    *engine_start* is the setting, *given* are arguments of ``vllm serve``.
    """
    if engine_start == "files":
        return "as engine_start says"
    flags = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in given}
    for name in _OTHERWISE:
        if name in engine_args or name in flags:
            return f"{name} is set"
    backend = "distributed_executor_backend"
    if backend in flags or engine_args.get(backend) not in (None, "mp", "uni"):
        return f"{backend} is set"
    plugins = os.environ.get(_PLUGINS)
    if plugins is not None and _PLUGIN not in plugins.split(","):
        return f"{_PLUGINS} leaves {_PLUGIN} out"
    return ""


def ready_timeout_s() -> float:
    """Return how long vLLM may take when it has all weights, as the user or vLLM says."""
    try:
        return float(os.environ[READY_TIMEOUT])
    except (KeyError, ValueError):
        return _OWN_READY_TIMEOUT_S


def too_late(limit_s: float) -> EngineError:
    """Return the error for an engine that is not ready so long after all weights were here."""
    return EngineError(
        "vLLM did not start in time",
        expected=f"an engine {show_seconds(limit_s)} after all weights were here",
        next_step=f"the engine's own log lines above tell how far it was; {READY_TIMEOUT} is the "
        "limit in seconds",
    )


def stream_environment() -> dict[str, str]:
    """Return the variables of a process that starts vLLM: before that is imported."""
    return {STREAM_VARIABLE: "1", READY_TIMEOUT: str(_READY_TIMEOUT_S)}
