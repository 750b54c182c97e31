"""The demo: train (once), publish behind signed URLs, then the main job as a user would do it.

::

    <folder>/
      origin/training_projects/demo/jobs/<job>/rank-<N>/…   what the origin serves
      <job>_checkpoints.json                                its listing, with signed URLs
      config.yaml                                           the Truss config
      training_checkpoints/                                 download_folder
"""

from __future__ import annotations

import asyncio
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from loader import boot
from loader.config.settings import Settings
from loader.demo.origin import PROJECT, Origin
from loader.demo.train import BASE_JOB, BASE_STEPS, QUESTIONS, TUNED_JOB, TUNED_STEPS
from loader.timeline import Timeline

if TYPE_CHECKING:
    from loader.fetch.progress import Progress
    from loader.serve.model import ServedModel

_LIFETIME_S = 900.0
_QUIET = {
    "DS_ACCELERATOR": "cpu",  # accelerate imports DeepSpeed, which tells where it finds itself
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-torch._library.triton",  # it tells that Triton is not installed
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def run(folder: Path, say: Callable[[str], None], progress: Callable[[], Progress]) -> Timeline:
    """Do the whole job below *folder* and return how long each step took."""
    folder = folder.absolute()
    timeline = Timeline()
    _hush()
    _train(folder, timeline, say)
    origin = Origin(folder / "origin", lifetime_s=_LIFETIME_S).start()
    try:
        say("")
        say(f"# published behind signed URLs that end in {_LIFETIME_S / 60:.0f} minutes")
        config = _write_config(folder, origin)
        say("")
        say(f"# podloader prepare {_shown(config)}")
        settings = Settings.load(config)
        ready = boot.prepare_beside_imports(settings, progress(), timeline)
    finally:
        origin.stop()
    say("")
    say(f"# {settings.engine} serves {BASE_JOB} and the adapter {ready.adapters[0].name}")
    model = boot.start(ready, settings, timeline)
    try:
        with timeline.stage("answers"):
            answers = asyncio.run(_ask(model, [BASE_JOB, ready.adapters[0].name]))
    finally:
        model.close()
    for question, (base, tuned) in answers.items():
        for line in ("", f"  {question}", f"    base        {base}", f"    fine-tuned  {tuned}"):
            say(line)
    say("")
    return timeline


def _train(folder: Path, timeline: Timeline, say: Callable[[str], None]) -> None:
    from loader.demo.train import train_adapter, train_base

    jobs = folder / "origin" / "training_projects" / PROJECT / "jobs"
    base, tuned = jobs / BASE_JOB, jobs / TUNED_JOB
    jobs.mkdir(parents=True, exist_ok=True)
    if not base.exists():
        say("# training a tiny Llama with the HF Trainer")
        shutil.rmtree(tuned, ignore_errors=True)
        with timeline.stage("train the base"):
            train_base(base)
    if not tuned.exists():
        say("# training a LoRA over it with PEFT")
        with timeline.stage("train the LoRA"):
            train_adapter(base / "rank-0" / f"checkpoint-{BASE_STEPS}", tuned)


def _write_config(folder: Path, origin: Origin) -> Path:
    listings = [
        origin.write_listing(job, folder / f"{job}_checkpoints.json")
        for job in (BASE_JOB, TUNED_JOB)
    ]
    config: dict[str, Any] = {
        "model_name": "podloader demo",
        "training_checkpoints": {
            "download_folder": str(folder / "training_checkpoints"),
            "artifact_references": [
                {"training_job_id": TUNED_JOB, "paths": [f"rank-*/checkpoint-{TUNED_STEPS}/"]}
            ],
        },
        "model_metadata": {
            "podloader": {
                "artifacts": [str(path) for path in listings],
                "base_model": f"checkpoint:{BASE_JOB}/rank-0/checkpoint-{BASE_STEPS}/",
                "adapter_policy": "attach",  # so that base and adapter can both be asked
                "served_model_name": BASE_JOB,
                "engine": "vllm" if _has_vllm() else "transformers",
                "engine_args": {
                    "enforce_eager": True,
                    "max_model_len": 256,
                    "use_tqdm_on_load": False,
                },
            }
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


async def _ask(model: ServedModel, names: list[str]) -> dict[str, list[str]]:
    """Return what each of *names* answers to each question, all asked at once."""

    async def ask(name: str, question: str) -> str:
        request = {
            "model": name,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 40,
        }
        answer = await model.predict(request)
        assert isinstance(answer, dict)
        return str(answer["choices"][0]["message"]["content"])

    asked = [(question, name) for question in QUESTIONS for name in names]
    found = await asyncio.gather(*(ask(name, question) for question, name in asked))
    pairs = dict(zip(asked, found, strict=True))
    return {question: [pairs[question, name] for name in names] for question in QUESTIONS}


def _has_vllm() -> bool:
    from importlib.util import find_spec

    return find_spec("vllm") is not None


def _hush() -> None:
    """Keep the libraries' own talk out of the demo, but for errors."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
