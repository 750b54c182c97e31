"""``podloader truss init``: the options, and the questions to a terminal for the rest."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loader.cli.report import errors_shown, say, show, write_json
from loader.errors import ConfigError

if TYPE_CHECKING:
    from loader.scaffold.deployment import Deployment, Wishes

Words = list[str] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What ``truss init`` was given; see ``arguments``."""

    output: Path | None
    deployed: Path | None
    artifacts: Words
    job_id: Words
    checkpoint: Words
    name: str | None
    base_model: str | None
    max_model_len: int | None
    requests: int
    accelerator: str | None
    env: Words
    secret: Words
    interactive: bool
    overwrite: bool
    as_json: bool


def init(given: Options) -> None:
    """Make the Truss that serves a training job's checkpoints."""
    with errors_shown(given.as_json, "nothing was written"):
        from loader.cli import questions
        from loader.cli.display import choose_progress
        from loader.scaffold.choice import check_together, choose
        from loader.scaffold.deployment import decide
        from loader.scaffold.folder import check_output, write_truss
        from loader.scaffold.selection import LATEST
        from loader.scaffold.survey import survey

        asks = (
            given.interactive and not given.as_json and sys.stdin.isatty() and sys.stderr.isatty()
        )
        given, wishes = _wished(given)
        if given.output is not None:
            check_output(given.output, given.overwrite)  # before anybody answers questions
        sources, jobs = tuple(given.artifacts or ()), given.job_id or ()
        if asks and not sources and given.deployed is None:
            sources, found = questions.ask_source(jobs)
        else:
            found = survey(sources, jobs, progress=choose_progress())
        if asks and not given.checkpoint:
            chosen = questions.ask_checkpoints(found)
        else:
            chosen = choose(found, given.checkpoint or [LATEST])
        check_together(chosen)
        wishes = replace(wishes, sources=sources)
        if asks:
            wishes = questions.ask_rest(chosen, questions.ask_base(chosen, wishes))
        with choose_progress().step("base model"):
            deployment = decide(chosen, wishes)
        output = given.output or (questions.ask_output(deployment.model_name) if asks else None)
        if output is None:
            raise ConfigError("the folder to make is not named", next_step="give --output DIR")
        write_truss(deployment, wishes.sources, output, overwrite=given.overwrite)
        _show(deployment, output)
        if given.as_json:
            write_json(_document(deployment, output))


def _wished(given: Options) -> tuple[Options, Wishes]:
    """Return what was asked for, with what ``--from`` names where no option says otherwise."""
    from loader.scaffold.deployed import read_deployed
    from loader.scaffold.deployment import Secret, Wishes
    from loader.stores.baseten import NAME as BASETEN

    told = read_deployed(given.deployed) if given.deployed is not None else None
    before = told.wishes if told else Wishes()
    if told is not None:
        given = replace(
            given,
            artifacts=given.artifacts or [BASETEN],
            job_id=given.job_id or list(told.jobs),
            checkpoint=given.checkpoint or list(told.checkpoints),
        )
    secrets = tuple(Secret(*reversed(text.split("=", 1))) for text in given.secret or ())
    return given, replace(
        before,
        model_name=given.name or before.model_name,
        base_model=given.base_model or before.base_model,
        max_model_len=given.max_model_len or before.max_model_len,
        requests=given.requests,
        accelerator=given.accelerator or before.accelerator,
        environment={**before.environment, **dict(map(_variable, given.env or ()))},
        secrets=(*before.secrets, *secrets),
    )


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(
            "--env takes a variable and its value", expected="NAME=VALUE", got=name or "no name"
        )
    return name, value


def is_folder_here(base_model: str) -> bool:
    """Return whether a base model is a path of this machine."""
    from loader.config.values import user_path
    from loader.stores.registry import is_remote

    return base_model.lower().startswith("file:") or (
        not is_remote(base_model) and user_path(base_model).is_dir()
    )


def _show(deployment: Deployment, output: Path) -> None:
    for found in deployment.chosen:
        show(f"{found.kind.value:<9}  {found.path}")
    if deployment.base_model:
        show(f"base       {deployment.base_model}")
    show(f"GPUs       {deployment.placement.accelerator}")
    for line in deployment.placement.calculation:
        show(f"           {line}")
    show(f"names      {', '.join([*deployment.adapters, deployment.served_model_name])}")
    show(f"Truss      {output}")
    if deployment.base_model and is_folder_here(deployment.base_model):
        say(
            f"warning: {deployment.base_model} is a folder of this machine, which no pod has; give "
            "a Hugging Face id or a folder's URL with --base-model"
        )
    if any((output / "data").glob("*.json")):
        say(
            "warning: the URLs of the listing in data/ end after 7 days at most, also for pods "
            "that start later; --artifacts baseten with --secret baseten_api_key does not end"
        )
    show(f"next       truss push {shlex.quote(str(output))}")


def _document(deployment: Deployment, output: Path) -> dict[str, object]:
    return {
        "output": str(output),
        "checkpoints": [{"kind": f.kind.value, "path": f.path} for f in deployment.chosen],
        "base_model": deployment.base_model,
        "accelerator": deployment.placement.accelerator,
        "calculation": list(deployment.placement.calculation),
        "names": [*deployment.adapters, deployment.served_model_name],
        "vllm_serve": list(deployment.command),
    }
