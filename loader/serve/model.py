"""What every engine offers, whichever library answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from loader.errors import ConfigError
from loader.types import ReadyModel


class ServedModel(Protocol):
    """A model that answers OpenAI chat and completions requests once it is loaded."""

    def load(self) -> None:
        """Start the engine; nothing while it is healthy, anew once it is dead. In any thread.

        Raises:
            ConfigError: arguments that the engine does not know or refuses.
            EngineError: the engine did not start.
        """

    async def predict(self, request: Mapping[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        """Return the answer to an OpenAI body, or with ``stream: true`` its server-sent events.

        Any number of calls may run at once, on any event loop. One that is cancelled, or whose
        stream is closed, stops generating.

        Raises:
            RequestError: the body is wrong; ``status`` is the HTTP status.
            EngineError: the engine is not running.
        """

    def is_healthy(self) -> bool:
        """Return whether requests can be answered now."""

    def close(self) -> None:
        """Stop the engine and free what it holds; a second call does nothing."""


def base_name(ready: ReadyModel, served_model_name: str | None) -> str:
    """Return the name that requests give the base or merged model.

    A merged model answers by the name that its adapter would have had, attached.
    """
    return served_model_name or str(ready.provenance.get("name") or ready.path.name)


def ready_folder(path: Path) -> ReadyModel:
    """Return the ReadyModel of a Hugging Face folder without adapters.

    Raises:
        ConfigError: there is no model in *path*.
    """
    if not (path / "config.json").is_file():
        raise ConfigError(
            "no model folder",
            where=str(path),
            expected="a Hugging Face folder with a config.json",
            got="a folder without one" if path.is_dir() else "no such folder",
            next_step="give the folder that `podloader prepare` printed",
        )
    return ReadyModel(path, (), None, path, {})
