"""``podloader truss init``: the options, and the questions to a terminal for the rest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from loader.cli.report import errors_shown, say, write_json

if TYPE_CHECKING:
    from loader.scaffold.deployment import Deployment, Wishes
    from loader.scaffold.survey import Found

truss = typer.Typer(
    help="Make Trusses.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
_SHOWN = 20
Words = Optional[list[str]]  # noqa: UP045 - typer reads annotations at run time


@truss.callback()
def top() -> None:
    """Make Trusses."""


@truss.command()
def init(
    output: Annotated[Path, typer.Option(help="The Truss folder to make.")],
    artifacts: Annotated[
        Words,
        typer.Option(metavar="SRC", help="Where the checkpoints are listed. Repeatable."),
    ] = None,
    job_id: Annotated[
        Words, typer.Option(metavar="JOB", help="Checkpoints of this job only. Repeatable.")
    ] = None,
    checkpoint: Annotated[
        Words,
        typer.Option(
            metavar="NAME", help="A checkpoint by its folder, or latest. Repeatable for LoRA."
        ),
    ] = None,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The model's name. Default: that of the base model or checkpoint."),
    ] = None,
    base_model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The base model. Default: what the adapter's config names."),
    ] = None,
    max_model_len: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Tokens of one request. Default: 8192, or what the model knows."),
    ] = None,
    requests: Annotated[
        int, typer.Option(help="Requests of that length to have room for at once.", min=1)
    ] = 4,
    accelerator: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="GPUs, such as L4 or H100:2. Default: what the model needs."),
    ] = None,
    env: Annotated[
        Words, typer.Option(metavar="NAME=VALUE", help="An environment variable. Repeatable.")
    ] = None,
    secret: Annotated[
        Words,
        typer.Option(
            metavar="[VARIABLE=]NAME",
            help="A secret of the platform, and a variable to put it into. Repeatable.",
        ),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option("--interactive/--non-interactive", help="Ask, where there is a terminal."),
    ] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace a Truss that is there.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document to standard output.")
    ] = False,
) -> None:
    """Make the Truss that serves a training job's checkpoints."""
    with errors_shown(as_json):
        from loader.scaffold.choice import LATEST, check_together, choose
        from loader.scaffold.deployment import Secret, Wishes, decide
        from loader.scaffold.survey import survey
        from loader.scaffold.truss import write_truss

        asks = interactive and not as_json and sys.stdin.isatty() and sys.stderr.isatty()
        found = survey(artifacts or (), job_id or ())
        if asks and not checkpoint:
            chosen = _ask_checkpoints(found)
        else:
            chosen = choose(found, checkpoint or [LATEST])
        check_together(chosen)
        wishes = Wishes(
            model_name=name,
            base_model=base_model,
            max_model_len=max_model_len,
            requests=requests,
            accelerator=accelerator,
            sources=tuple(artifacts or ()),
            environment=dict(map(_variable, env or ())),
            secrets=tuple(Secret(*reversed(text.split("=", 1))) for text in secret or ()),
        )
        deployment = decide(chosen, wishes)
        if asks:
            deployment = _ask_rest(chosen, wishes, deployment)
        write_truss(deployment, artifacts or (), output, overwrite=overwrite)
        _show(deployment, output)
        if as_json:
            write_json(_document(deployment, output))


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
        text = typer.prompt("Which (several LoRA with commas)", default="1", err=True)
        words = [word.strip() for word in text.split(",")]
        if all(word.isdecimal() and 0 < int(word) <= len(listed) for word in words):
            return tuple(listed[int(word) - 1] for word in dict.fromkeys(words))
        say(f"numbers from 1 to {len(listed)}, please")


def _ask_rest(chosen: tuple[Found, ...], wishes: Wishes, deployment: Deployment) -> Deployment:
    """Return the deployment with what a person changed; what an option gave is not asked again."""
    from dataclasses import replace

    from loader.scaffold.deployment import decide

    if wishes.model_name is None:
        name = typer.prompt("Model name", default=deployment.model_name, err=True)
        wishes = replace(wishes, model_name=name)
    length = deployment.engine_args.get("max_model_len")
    if wishes.max_model_len is None and isinstance(length, int):
        asked = typer.prompt("Tokens of one request", default=length, type=int, err=True)
        wishes = replace(wishes, max_model_len=asked)
    deployment = decide(chosen, wishes)
    if wishes.accelerator is None:
        for line in deployment.placement.calculation:
            say(f"  {line}")
        gpus = typer.prompt("GPUs", default=deployment.placement.accelerator, err=True)
        deployment = decide(chosen, replace(wishes, accelerator=gpus))
    return deployment


def _show(deployment: Deployment, output: Path) -> None:
    for found in deployment.chosen:
        say(f"{found.kind.value:<9}  {found.path}")
    if deployment.base_model:
        say(f"base       {deployment.base_model}")
    say(f"GPUs       {deployment.placement.accelerator}")
    for line in deployment.placement.calculation:
        say(f"           {line}")
    say(f"names      {', '.join([*deployment.adapters, deployment.served_model_name])}")
    say(f"Truss      {output}")


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
