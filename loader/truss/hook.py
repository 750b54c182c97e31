"""The model class of a Truss: ``class Model(TrussModel)`` is all that ``model/model.py`` needs.

Annotations here are objects, not strings: Truss's server looks at them to tell a method that takes
the HTTP request from one that does not.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from loader import boot
from loader.config.credentials import Secrets
from loader.config.settings import Settings, traces_exporter
from loader.errors import RequestError
from loader.fetch.progress import LogProgress
from loader.serve.model import ServedModel
from loader.serve.request_body import PROMPTS, check_prompt
from loader.status.table import timeline_lines
from loader.status.tracing import exporting
from loader.timeline import Timeline

_CLIENT_CLOSED_REQUEST = 499  # nginx's code, which Truss uses too
_log = logging.getLogger("podloader")


class TrussModel:
    """Fetches what ``training_checkpoints`` names, starts the engine, answers OpenAI requests.

    Built by Truss's server, which passes the arguments that this constructor has. ``config`` is the
    Truss config as a plain dict; ``secrets`` are only ever looked up by name.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        data_dir: Path | None = None,
        secrets: Secrets | None = None,
        lazy_data_resolver: Any = None,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        self._config = config
        self._folder = Path(data_dir).parent if data_dir is not None else None
        self._secrets = secrets
        self._lazy_data_resolver = lazy_data_resolver
        self._lock = threading.Lock()
        self._model: ServedModel | None = None

    def settings(self) -> Settings:
        """Return the settings; relative paths in the config are relative to the Truss.

        Raises:
            ConfigError: naming every key that is wrong.
        """
        return Settings.load(self._config, secrets=self._secrets, folder=self._folder)

    def load(self) -> None:
        """Prepare the model and start the engine; nothing while that answers, anew once it is dead.

        The engine is imported while the files arrive. At the end the log shows where the seconds
        went, which are OpenTelemetry's spans, too, where the ``OTEL_*`` variables ask for them.

        Raises:
            LoaderError: see ``loader.errors``; another try goes on from what is on disk.
        """
        with self._lock:
            if self.is_healthy():
                return
            if self._model is not None:
                _log.warning("the engine is dead; it is started anew")
                self._model.close()
                self._model = None
            if _log.level == logging.NOTSET:
                _log.setLevel(logging.INFO)
            if self._lazy_data_resolver is not None:
                # Truss's own model_cache, which may hold the base model; Truss insists on this.
                self._lazy_data_resolver.block_until_download_complete()
            settings = self.settings()
            timeline = Timeline()
            try:
                with exporting(timeline, traces_exporter()), contextlib.closing(timeline):
                    _, self._model = boot.prepare_and_start(settings, LogProgress(), timeline)
            except Exception as error:
                # Truss itself tells the class of what is raised here.
                _log.error("the model did not start: %s", error)
                raise
            finally:
                for line in timeline_lines(timeline) if timeline.stages else ():
                    _log.info("%s", line)

    async def predict(self, request: Any, http: Request = None) -> Response:  # type: ignore[assignment]
        """Return the answer to an OpenAI body, as HTTP.

        ``messages`` make it a chat, ``prompt`` a completion, ``input`` embeddings, ``file`` (a
        sound file in base64) a transcription. With ``stream: true`` it is a stream of server-sent
        events. A bad request is answered with its 4xx status and OpenAI's ``error`` object; a
        client that goes away stops its request.
        """
        return await self._answer(request, http)

    async def chat_completions(self, request: Any, http: Request = None) -> Response:  # type: ignore[assignment]
        """Answer ``/v1/chat/completions``."""
        return await self._answer(request, http, ("messages",))

    async def completions(self, request: Any, http: Request = None) -> Response:  # type: ignore[assignment]
        """Answer ``/v1/completions``."""
        return await self._answer(request, http, ("prompt",))

    async def embeddings(self, request: Any, http: Request = None) -> Response:  # type: ignore[assignment]
        """Answer ``/v1/embeddings``."""
        return await self._answer(request, http, ("input",))

    def is_healthy(self) -> bool:
        """Return whether the engine can answer now."""
        return self._model is not None and self._model.is_healthy()

    async def _answer(
        self, request: Any, http: Request | None, known: Sequence[str] = PROMPTS
    ) -> Response:
        if self._model is None:
            return _failure(RequestError("the model is not loaded yet", status=503))
        try:
            body = check_prompt(request, known)
            answer = await _unless_gone(self._model.predict(body), http)
        except RequestError as error:
            return _failure(error)
        if answer is None:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        if isinstance(answer, dict):
            return JSONResponse(answer)
        # Starlette closes the stream, and with it the request, when the client goes away; a bare
        # generator would be read to its end by Truss, and gathered for some clients.
        return StreamingResponse(answer, media_type="text/event-stream")


def _failure(error: RequestError) -> JSONResponse:
    """Return *error* in OpenAI's shape."""
    kind = "NotFoundError" if error.status == 404 else "BadRequestError"
    content = {
        "message": error.line,
        "type": kind,
        "param": error.where or None,
        "code": error.status,
    }
    return JSONResponse({"error": content}, status_code=error.status)


async def _unless_gone(answering: Any, http: Request | None) -> Any:
    """Return what *answering* gives, or None where the client went away before."""
    if http is None:
        return await answering
    answer = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        for task in (answer, gone):
            task.cancel()


async def _disconnected(http: Request) -> None:
    """Return when the client is gone; the server has read the body before."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
