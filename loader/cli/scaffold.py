"""``podloader truss init``: the options, and the questions to a terminal for the rest."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loader.cli.report import errors_shown, say, show, write_json

if TYPE_CHECKING:
    from loader.scaffold.deployment import Deployment, Wishes
    from loader.scaffold.survey import Found

_SHOWN = 20
Words = list[str] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What ``truss init`` was given; see ``arguments``."""

    output: Path
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
    with errors_shown(given.as_json):
        from loader.scaffold.choice import check_together, choose
        from loader.scaffold.deployment import Secret, Wishes, decide
        from loader.scaffold.folder import write_truss
        from loader.scaffold.selection import LATEST
        from loader.scaffold.survey import survey

        asks = (
            given.interactive and not given.as_json and sys.stdin.isatty() and sys.stderr.isatty()
        )
        found = survey(given.artifacts or (), given.job_id or ())
        if asks and not given.checkpoint:
            chosen = _ask_checkpoints(found)
        else:
            chosen = choose(found, given.checkpoint or [LATEST])
        check_together(chosen)
        wishes = Wishes(
            model_name=given.name,
            base_model=given.base_model,
            max_model_len=given.max_model_len,
            requests=given.requests,
            accelerator=given.accelerator,
            sources=tuple(given.artifacts or ()),
            environment=dict(map(_variable, given.env or ())),
            secrets=tuple(Secret(*reversed(text.split("=", 1))) for text in given.secret or ()),
        )
        deployment = decide(chosen, wishes)
        if asks:
            deployment = _ask_rest(chosen, wishes, deployment)
        write_truss(deployment, given.artifacts or (), given.output, overwrite=given.overwrite)
        _show(deployment, given.output)
        if given.as_json:
            write_json(_document(deployment, given.output))


def _variable(text: str) -> tuple[str, str]:
    from loader.errors import ConfigError

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(
            "--env takes a variable and its value", expected="NAME=VALUE", got=name or "no name"
        )
    return name, value


def _ask_checkpoints(found: tuple[Found, ...]) -> tuple[Found, ...]:
    """Return the checkpoints that a person chooses from the list, the most recent by default."""
    from loader.scaffold.choice import by_step

    listed = by_step(found)
    if len(listed) == 1:
        return (listed[0],)
    for number, one in enumerate(listed[:_SHOWN], start=1):
        say(f"{number:>4}  {one.path}  ({one.kind.value})")
    if len(listed) > _SHOWN:
        say(f"      … and {len(listed) - _SHOWN} more: name one with --checkpoint")
    while True:
        text = _ask("Which (several LoRA with commas)", "1")
        words = [word.strip() for word in text.split(",")]
        if all(word.isdecimal() and 0 < int(word) <= len(listed) for word in words):
            return tuple(listed[int(word) - 1] for word in dict.fromkeys(words))
        say(f"numbers from 1 to {len(listed)}, please")


def _ask_rest(chosen: tuple[Found, ...], wishes: Wishes, deployment: Deployment) -> Deployment:
    """Return the deployment with what a person changed; what an option gave is not asked again."""
    from loader.scaffold.deployment import decide

    if wishes.model_name is None:
        name = _ask("Model name", deployment.model_name)
        wishes = replace(wishes, model_name=name)
    length = deployment.engine_args.get("max_model_len")
    if wishes.max_model_len is None and isinstance(length, int):
        asked = _ask_number("Tokens of one request", length)
        wishes = replace(wishes, max_model_len=asked)
    deployment = decide(chosen, wishes)
    if wishes.accelerator is None:
        for line in deployment.placement.calculation:
            say(f"  {line}")
        gpus = _ask("GPUs", deployment.placement.accelerator)
        deployment = decide(chosen, replace(wishes, accelerator=gpus))
    return deployment


def _ask(question: str, default: str) -> str:
    from rich.console import Console
    from rich.prompt import Prompt

    return Prompt.ask(question, default=default, console=Console(stderr=True))


def _ask_number(question: str, default: int) -> int:
    from rich.console import Console
    from rich.prompt import IntPrompt

    return IntPrompt.ask(question, default=default, console=Console(stderr=True))


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
