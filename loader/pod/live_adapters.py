"""Adapters for a server that runs already: fetched from training checkpoints, and proved to fit.

A checkpoint is named ``<job>/<checkpoint>``, its folder on the first node. What a *request* may
name is limited by the settings: the jobs in ``adapter_jobs``, in the listings of ``artifacts``.
What the program itself asks for through ``LiveAdapters`` needs a listing alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from loader import boot
from loader.adapters.attach import NamedAdapter, attach, decide
from loader.adapters.base_task import decide_for_base, is_pooled
from loader.config.settings import Settings
from loader.errors import CheckpointError, RequestError
from loader.fetch.files import STATE
from loader.log_lines import set_up_logging
from loader.prepare.checkpoint_sources import refuse_unlike_nodes
from loader.types import (
    CONFIG_VARIABLE,
    JOB_ID,
    ArtifactReference,
    Kind,
    ServedAdapter,
    TrainingCheckpoints,
)
from loader.weights.inspect import find_checkpoints
from loader.weights.quantised import read_model_config

# A folder's name, or several below each other: no "..", no pattern, nothing that a shell or a URL
# would read in another way.
_CHECKPOINT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=-]*(/[A-Za-z0-9_][A-Za-z0-9._=-]*)*")
_LONGEST_NAME = 200
_log = logging.getLogger("podloader")


class AdapterHost(Protocol):
    """A running model that takes adapters, such as ``VLLMModel``."""

    @property
    def adapters(self) -> tuple[ServedAdapter, ...]:
        """Those that requests can name now."""

    def add_adapter(self, adapter: ServedAdapter, *, replace: bool = False) -> None:
        """Serve one more, or another one under a name that is served."""

    def remove_adapter(self, name: str) -> None:
        """Serve it no more."""


class LiveAdapters:
    """The adapters of *model*, a running engine over the model in *base*.

    Fetches run in the background, one at a time: the answers go on meanwhile.
    """

    def __init__(self, model: AdapterHost, base: Path, settings: Settings) -> None:
        self._model, self._base, self._settings = model, base, settings
        self._worker = ThreadPoolExecutor(1, "adapters")

    def add(self, job: str, *patterns: str, name: str | None = None) -> Future[ServedAdapter]:
        """Begin to fetch the adapter that *patterns* choose in *job*; the future is done when it
        answers requests. Its name is by default ``<job>/<checkpoint folder>``.

        The future raises LoaderError: of the listing, the patterns, the fetch, an adapter that does
        not fit or changes nothing, a name that is taken.
        """
        return self._worker.submit(self._bring, job, patterns, name, replace=False)

    def replace(self, name: str, job: str, *patterns: str) -> Future[ServedAdapter]:
        """Begin to fetch another adapter for *name*. Requests under way are answered by the old."""
        return self._worker.submit(self._bring, job, patterns, name, replace=True)

    def remove(self, name: str) -> None:
        """Serve the adapter *name* no more; its files stay.

        Raises:
            RequestError: there is none (404).
        """
        self._model.remove_adapter(name)

    def list(self) -> tuple[ServedAdapter, ...]:
        """Return those that requests can name now."""
        return self._model.adapters

    def close(self) -> None:
        """Wait for the fetch under way and take no more."""
        self._worker.shutdown()

    def _bring(
        self, job: str, patterns: Sequence[str], name: str | None, *, replace: bool
    ) -> ServedAdapter:
        adapter = fetch_adapter(self._settings, self._base, job, patterns, name)
        self._model.add_adapter(adapter, replace=replace)
        return adapter


def fetch_adapter(
    settings: Settings, base: Path, job: str, patterns: Sequence[str], name: str | None = None
) -> ServedAdapter:
    """Return the adapter that *patterns* choose in *job*: here, verified, fit for *base*.

    Raises:
        LoaderError: of the listing, the patterns or the fetch.
        AdapterError: it does not fit the base, changes nothing, or vLLM cannot attach it.
        CheckpointError: the patterns choose something else than one adapter.
    """
    training = TrainingCheckpoints(
        settings.training.download_folder, (ArtifactReference(job, tuple(patterns)),)
    )
    wanted = replace(settings, training=training, base_model=None)
    snapshot = boot.fetch_files(wanted)
    found = find_checkpoints(snapshot.root, [file.path for file in snapshot.files])
    if len(found) != 1 or found[0].kind is not Kind.ADAPTER:
        raise CheckpointError(
            "not one adapter",
            where=f"{job}: {', '.join(patterns)}",
            expected="the folder of one PEFT adapter",
            problems=[f"{c.kind}: {c.path.relative_to(snapshot.root)}" for c in found],
            next_step="choose the adapter's whole folder, with / at its end",
        )
    folder = found[0].path
    home = f"{folder.relative_to(snapshot.root).as_posix()}/"
    refuse_unlike_nodes((f.path for f in snapshot.files if f.path.startswith(home)), snapshot)
    return check_adapter(settings, base, folder, name or f"{job}/{folder.name}")


def check_adapter(settings: Settings, base: Path, folder: Path, name: str) -> ServedAdapter:
    """Return the adapter in *folder*, fit for *base*, to be served as *name*.

    Raises:
        AdapterError: it does not fit the base, changes nothing, or vLLM cannot attach it.
        CheckpointError: no adapter, or a broken one.
    """
    named = NamedAdapter(name, folder)
    config, args = read_model_config(base), settings.engine_args
    decision = decide("attach", [named])
    decide_for_base(decision, "attach", [named], config, pooled=is_pooled(base, args))
    own = settings.cache_folder or settings.training.download_folder / STATE / "models"
    output = own / f"tokenizer-{'-'.join(folder.parts[-3:])}"
    ready = attach(base, [named], output, allow_pickle=settings.allow_pickle)
    if ready.tokenizer == folder:
        _log.warning("%s came with a tokenizer, but the server keeps its own", name)
    return ready.adapters[0]


def fetch_named(settings: Settings, base: Path, name: str) -> ServedAdapter:
    """Return the adapter that a request names ``<job>/<checkpoint>``.

    Raises:
        RequestError: no such name, or a job that the settings do not allow (404).
        LoaderError: as ``fetch_adapter``.
    """
    job, slash, checkpoint = name.partition("/")
    well_formed = (
        bool(slash)
        and len(name) <= _LONGEST_NAME
        and JOB_ID.fullmatch(job)
        and _CHECKPOINT.fullmatch(checkpoint)
    )
    if not well_formed or job not in settings.adapter_jobs:
        raise RequestError(
            "no adapter of that name",
            status=404,
            where=name[:_LONGEST_NAME],
            expected="<job>/<checkpoint>, with the job among adapter_jobs",
        )
    return fetch_adapter(settings, base, job, [f"rank-0/{checkpoint}/"], name)


def live_environment(settings: Settings, config: Path) -> Mapping[str, str]:
    """Return the variables that let vLLM's server fetch adapters by itself, as *settings* allow.

    They name *config*, the file that the settings were read from, and hold what was set over it.
    There may be signed URLs among them: for a process's environment, not for a log.
    """
    if not settings.adapter_jobs:
        return {}
    return {
        **settings.variables(),
        CONFIG_VARIABLE: str(config.absolute()),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }


def teach_vllm(config: str) -> None:
    """Let the vLLM of this process fetch the adapters that *config*, a Truss config, allows."""
    settings = Settings.load(config)
    if settings.adapter_jobs:
        set_up_logging()
        from loader.serve.vllm import lora_manager  # noqa: F401 - for the engine's processes
        from loader.serve.vllm.resolver import AdapterSource, install

        source = AdapterSource(
            settings.adapter_jobs,
            settings.training.download_folder,
            fetch=lambda base, name: fetch_named(settings, Path(base), name),
            check=lambda base, folder, name: check_adapter(settings, Path(base), folder, name),
        )
        install(source, canary=settings.canary)
