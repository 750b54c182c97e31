"""transformers and PEFT in this process: for machines without vLLM, and to compare it with.

One request is answered at a time, in one thread: PEFT switches adapters for the whole model.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loader.errors import ConfigError, EngineError, LoaderError, RequestError
from loader.serve.answer import DONE, Answer, failure
from loader.serve.canary import PROMPT, Said, distance, refuse_silent
from loader.serve.generation import Completion, LoadedModel, generate, prompt_logprobs
from loader.serve.model import base_name, ready_folder
from loader.serve.prompts import encode_prompts
from loader.serve.request_body import check_request
from loader.serve.sampling import Sampling, read_sampling
from loader.types import ReadyModel
from loader.weights.meta_models import read_model_config

_USED = ("dtype", "max_model_len")  # of vLLM's engine arguments
_DEFAULT_MAX_TOKENS = 16  # OpenAI's, for completions; a chat may fill the context
_log = logging.getLogger("podloader")


class TransformersModel:
    """A model folder and its adapters, answered by transformers.

    Takes what ``VLLMModel`` takes; of ``engine_args`` it heeds ``dtype`` (by default the
    checkpoint's, where vLLM turns float32 into bfloat16) and ``max_model_len``. ``device`` is
    torch's name of one; by default the first CUDA device, else the CPU.
    """

    def __init__(
        self,
        ready: ReadyModel | Path | str,
        *,
        engine_args: Mapping[str, object] | None = None,
        served_model_name: str | None = None,
        trust_remote_code: bool = False,
        canary: bool = True,
        device: str | None = None,
    ) -> None:
        self._canary = canary
        self._ready = ready if isinstance(ready, ReadyModel) else ready_folder(Path(ready))
        self._engine_args = dict(engine_args or {})
        self._trust_remote_code = trust_remote_code
        self._device = device
        self._base = base_name(self._ready, served_model_name)
        self._adapters = tuple(adapter.name for adapter in self._ready.adapters)
        self._lock = threading.Lock()
        self._worker: ThreadPoolExecutor | None = None
        self._loaded: LoadedModel | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a request's ``model`` may give, the base's first."""
        return (self._base, *self._adapters)

    def load(self) -> None:
        """Read the weights; a second call does nothing. May run in any thread.

        Raises:
            ConfigError: a ``dtype`` or ``max_model_len`` that is none.
            EngineError: the model could not be loaded.
            AdapterError: an adapter changes nothing.
        """
        with self._lock:
            if self._loaded is not None:
                return
            if ignored := sorted(self._engine_args.keys() - set(_USED)):
                _log.info("engine_args that are vLLM's alone: %s", ", ".join(ignored))
            try:
                loaded = self._load()
                if self._canary and self._adapters:
                    self._check_adapters(loaded)
                self._loaded = loaded
            except LoaderError:
                raise
            except Exception as error:
                raise EngineError(
                    "transformers did not load the model",
                    where=str(self._ready.path),
                    got=f"{type(error).__name__}: {error}",
                    next_step="install accelerate, peft and transformers; check that this version "
                    "of transformers knows the architecture in config.json",
                ) from error
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="transformers")

    async def predict(self, request: Mapping[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        """Return the answer to an OpenAI chat or completions body, or its server-sent events.

        Raises:
            RequestError: the body is wrong.
            EngineError: the model is not loaded, or failed.
        """
        loaded, worker = self._loaded, self._worker
        if loaded is None or worker is None:
            raise EngineError("the engine is not running", next_step="call load() first")
        body = check_request(request, base=self._base, adapters=self._adapters)
        work = _prepare(loaded, body, self._adapters)
        if work.sampling.stream:
            return _stream(worker, work)
        try:
            done = await asyncio.get_running_loop().run_in_executor(worker, work.run)
        except asyncio.CancelledError:
            work.cancelled.set()
            raise
        except Exception as error:
            raise EngineError(
                "the engine failed while answering",
                got=f"{type(error).__name__}: {error}",
                next_step="try a shorter prompt if memory ran out",
            ) from error
        return work.answer.whole(done)

    def is_healthy(self) -> bool:
        """Return whether the model is loaded."""
        return self._loaded is not None

    def close(self) -> None:
        """Let go of the model once the request under way is answered."""
        with self._lock:
            worker, self._worker, self._loaded = self._worker, None, None
        if worker is not None:
            worker.shutdown(cancel_futures=True)

    def _load(self) -> LoadedModel:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        ready = self._ready
        model = AutoModelForCausalLM.from_pretrained(
            ready.path,
            config=read_model_config(ready.path, trust_remote_code=self._trust_remote_code),
            dtype=self._dtype(),
            trust_remote_code=self._trust_remote_code,
        )
        own = model.generation_config.to_diff_dict()
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        eos = own.get("eos_token_id", model.config.eos_token_id)
        max_len = self._max_len(getattr(model.config, "max_position_embeddings", None))
        # generate() fills in from here what a request leaves at transformers' own default.
        model.generation_config = GenerationConfig()
        if ready.adapters:
            model = _with_adapters(model, ready)
        device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
        return LoadedModel(
            model=model.to(device).eval(),
            tokenizer=AutoTokenizer.from_pretrained(
                ready.tokenizer, trust_remote_code=self._trust_remote_code
            ),
            defaults={name: own[name] for name in names if own.get(name) is not None},
            max_len=max_len,
            eos=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )

    def _check_adapters(self, loaded: LoadedModel) -> None:
        prompt = loaded.tokenizer(PROMPT)["input_ids"]

        def say(adapter: str | None) -> Said:
            return Said(("",) * len(prompt), prompt_logprobs(loaded, prompt, adapter))

        base, again = say(None), say(None)
        noise = distance(base, again)
        refuse_silent(
            [
                name
                for index, name in enumerate(self._adapters)
                if not distance(base, say(_peft_name(index))) > noise
            ],
            noise,
        )

    def _dtype(self) -> object:
        import torch

        names = {"half": "float16", "float": "float32"}  # vLLM's other names
        asked = str(self._engine_args.get("dtype", "auto"))
        if asked == "auto":
            return asked
        found = getattr(torch, names.get(asked, asked), None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ConfigError(
                "no such dtype",
                where="model_metadata.podloader.engine_args.dtype",
                expected="auto, float32, bfloat16 or float16",
                got=asked,
                next_step="correct it",
            )
        return found

    def _max_len(self, own: int | None) -> int:
        asked = self._engine_args.get("max_model_len") or own or 2048
        if not isinstance(asked, int) or asked < 1:
            raise ConfigError(
                "max_model_len is no number of tokens",
                where="model_metadata.podloader.engine_args.max_model_len",
                expected="a whole number above 0",
                got=repr(asked),
                next_step="correct it",
            )
        return asked


@dataclass(frozen=True, slots=True)
class _Work:
    """One request, read and checked, for the worker thread."""

    loaded: LoadedModel
    prompts: list[list[int]]
    sampling: Sampling
    adapter: str | None
    answer: Answer
    cancelled: threading.Event = field(default_factory=threading.Event)

    def run(self, send: Callable[[str], None] | None = None) -> list[Completion]:
        """Answer every prompt in turn; ``send`` gets the events of a stream."""
        done: list[Completion] = []
        for index, prompt in enumerate(self.prompts):
            if self.cancelled.is_set():
                break
            if send is not None and (opening := self.answer.opening(index)):
                send(opening)
            emit = self._emitter(index, send)
            completion = generate(
                self.loaded, prompt, self.sampling, self.adapter, emit, self.cancelled
            )
            if send is not None:
                send(self.answer.closing(index, completion.finish_reason))
            done.append(completion)
        if send is not None and self.sampling.stream_options.include_usage:
            send(self.answer.accounts(done))
        return done

    def _emitter(self, index: int, send: Callable[[str], None] | None) -> Callable[[str], None]:
        if send is None:
            return lambda text: None
        return lambda text: send(self.answer.piece(index, text))


def _prepare(loaded: LoadedModel, body: Mapping[str, Any], adapters: tuple[str, ...]) -> _Work:
    sampling = read_sampling(body).with_defaults(loaded.defaults)
    prompts = encode_prompts(loaded.tokenizer, body)
    longest = max(map(len, prompts))
    chat = body.get("messages") is not None
    if sampling.max_tokens is None:
        room = max(loaded.max_len - longest, 1)
        sampling = sampling.model_copy(
            update={"max_tokens": room if chat else min(room, _DEFAULT_MAX_TOKENS)}
        )
    if longest + (sampling.max_tokens or 0) > loaded.max_len:
        raise RequestError(
            f"this model's maximum context length is {loaded.max_len} tokens",
            where="messages" if chat else "prompt",
            got=f"{longest} tokens in the prompt and {sampling.max_tokens} to generate",
            next_step="shorten the prompt or lower max_tokens",
        )
    name = body["model"]
    adapter = _peft_name(adapters.index(name)) if name in adapters else None
    return _Work(loaded, prompts, sampling, adapter, Answer(name, chat))


async def _stream(worker: ThreadPoolExecutor, work: _Work) -> AsyncGenerator[str, None]:
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[str | None] = asyncio.Queue()

    def send(event: str | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, event)

    def run() -> None:
        try:
            work.run(send)
        except Exception as error:
            _log.exception("the stream broke off")
            send(failure(f"{type(error).__name__}: {error}"))
        send(DONE)
        send(None)

    worker.submit(run)
    try:
        while (event := await events.get()) is not None:
            yield event
    finally:
        work.cancelled.set()


def _peft_name(index: int) -> str:
    return f"adapter_{index}"  # names of ours may hold dots, which torch forbids in module names


def _with_adapters(model: Any, ready: ReadyModel) -> Any:
    from peft import PeftModel

    first, *others = ready.adapters
    tuned = PeftModel.from_pretrained(model, first.path, adapter_name=_peft_name(0))
    for index, adapter in enumerate(others, start=1):
        tuned.load_adapter(adapter.path, adapter_name=_peft_name(index))
    return tuned
