"""What a pod's main thread waits for, and the errors of its own that end it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loader.errors import ConfigError, EngineError
from loader.pod.engine import EngineGone, EngineLoaded, EngineProcess
from loader.pod.node_group import NodeEvent
from loader.serve.vllm.streaming import Stream
from loader.types import ReadyModel

if TYPE_CHECKING:
    from loader.config.settings import Settings


@dataclass(frozen=True, slots=True)
class Announced:
    """Weights are on their way, and an engine may load them as they come."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class Late:
    """The engine has had all the time that it has."""

    engine: EngineProcess


@dataclass(frozen=True, slots=True)
class Prepared:
    """The model is here."""

    ready: ReadyModel


@dataclass(frozen=True, slots=True)
class Failed:
    """It could not be prepared."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Asked:
    """A signal asks for the end."""

    signal: int


Event = Announced | Late | Prepared | Failed | Asked | EngineLoaded | EngineGone | NodeEvent


def check_engine(settings: Settings) -> None:
    """Raise ConfigError where the settings ask for an engine that is no server."""
    if settings.engine != "vllm":
        raise ConfigError(
            "`podloader serve` is vLLM's server",
            where="engine",
            expected="vllm",
            got=settings.engine,
            next_step="leave engine out",
        )


def ended(code: int) -> EngineError:
    """Return the error for an engine that ended by itself."""
    return EngineError(
        "the engine ended while it served",
        got=f"exit code {code}",
        next_step="its own log lines above name the cause",
    )
