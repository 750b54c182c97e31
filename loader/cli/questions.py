"""The questions of ``truss init``: each answer is checked at once, and asked for again if wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from loader.cli.report import say
from loader.errors import ConfigError, LoaderError

if TYPE_CHECKING:
    from loader.scaffold.deployment import Wishes
    from loader.scaffold.survey import Found

_SHOWN = 20
_NONE = "none"
_T = TypeVar("_T")


def ask_source(jobs: Sequence[str]) -> tuple[tuple[str, ...], tuple[Found, ...]]:
    """Return where the checkpoints are listed, and those that are there."""
    from loader.cli.display import choose_progress
    from loader.scaffold.survey import survey
    from loader.stores.baseten import NAME as BASETEN

    def read(source: str) -> tuple[tuple[str, ...], tuple[Found, ...]]:
        wanted = list(jobs)
        if source == BASETEN and not wanted:
            wanted = [_ask("Training job's id")]
        return (source,), survey([source], wanted, progress=choose_progress())

    say("Where are the checkpoints listed? A file of `truss train get_checkpoint_urls`, its URL,")
    say("s3://bucket/prefix, or baseten")
    return _until_right("Source", read)


def ask_checkpoints(found: tuple[Found, ...]) -> tuple[Found, ...]:
    """Return the checkpoints that a person chooses from the list, the most recent by default."""
    from loader.scaffold.choice import by_step, check_together

    listed = by_step(found)
    if len(listed) == 1:
        return (listed[0],)
    for number, one in enumerate(listed[:_SHOWN], start=1):
        say(f"{number:>4}  {one.path}  ({one.kind.value})")
    if len(listed) > _SHOWN:
        say(f"      … and {len(listed) - _SHOWN} more: name one with --checkpoint")

    def read(text: str) -> tuple[Found, ...]:
        words = [word.strip() for word in text.split(",")]
        if not all(word.isdecimal() and 0 < int(word) <= len(listed) for word in words):
            raise ConfigError(f"numbers from 1 to {len(listed)}, please")
        chosen = tuple(listed[int(word) - 1] for word in dict.fromkeys(words))
        check_together(chosen)
        return chosen

    return _until_right("Which (several LoRA with commas)", read, "1")


def ask_base(chosen: tuple[Found, ...], wishes: Wishes) -> Wishes:
    """Return *wishes* with a base model of which something is known, where one is needed."""
    from loader.cli.display import choose_progress
    from loader.scaffold.base_model import choose_base, describe_base
    from loader.types import Kind

    adapters = [f for f in chosen if f.kind is Kind.ADAPTER]
    if not adapters and chosen[0].config:
        return wishes

    def read(name: str) -> Wishes:
        with choose_progress().step("base model"):
            describe_base(name)
        return replace(wishes, base_model=name)

    try:
        return read(choose_base(adapters, wishes.base_model))
    except LoaderError as error:
        _tell(error)
    return _until_right("Base model (a Hugging Face id, or a folder's URL)", read)


def ask_rest(chosen: tuple[Found, ...], wishes: Wishes) -> Wishes:
    """Return *wishes* with what a person changed; what an option gave is not asked again."""
    from loader.scaffold.deployment import Secret, decide

    def checked(changed: Wishes) -> Wishes:
        decide(chosen, changed)
        return changed

    deployment = decide(chosen, wishes)
    if wishes.model_name is None:
        wishes = _until_right(
            "Model name",
            lambda name: checked(replace(wishes, model_name=name)),
            deployment.model_name,
        )
    length = deployment.engine_args.get("max_model_len")
    if wishes.max_model_len is None and isinstance(length, int):
        wishes = _until_right(
            "Tokens of one request",
            lambda text: checked(replace(wishes, max_model_len=_count(text))),
            str(length),
        )
    if wishes.accelerator is None:
        deployment = decide(chosen, wishes)
        for line in deployment.placement.calculation:
            say(f"  {line}")
        say(f"  enough for it: {', '.join(deployment.gpus())}")
        wishes = _until_right(
            "GPUs",
            lambda text: checked(replace(wishes, accelerator=text)),
            deployment.placement.accelerator,
        )
    wishes = _offer_platform(wishes)
    needed = [secret.name for secret in decide(chosen, wishes).secrets]
    if not wishes.secrets:
        if needed:
            say(f"  secrets that the pod needs anyway: {', '.join(needed)}")

        def read(text: str) -> Wishes:
            words = [] if text == _NONE else text.replace(",", " ").split()
            made = tuple(Secret(*reversed(word.split("=", 1))) for word in words)
            return replace(wishes, secrets=made)

        wishes = _until_right("Further secrets (NAME or VARIABLE=NAME)", read, _NONE)
    return wishes


def ask_output(model_name: str) -> Path:
    """Return the folder to make."""
    from loader.scaffold.folder import check_output

    def read(text: str) -> Path:
        check_output(Path(text).expanduser(), overwrite=False)
        return Path(text).expanduser()

    return _until_right("Folder to make", read, f"./{model_name}")


def _offer_platform(wishes: Wishes) -> Wishes:
    """Return *wishes* with the platform as the pod's source, where a listing's URLs would end."""
    from loader.stores.baseten import NAME as BASETEN

    files = [source for source in wishes.sources if Path(source).is_file()]
    if not files:
        return wishes
    say(f"  The pod would have {', '.join(files)} in data/, whose URLs {_when_they_end(files)};")
    say("  pods that start later could fetch nothing. The platform signs URLs anew: it needs the")
    say("  secret baseten_api_key, and the training job to be one of your own there.")

    def read(text: str) -> Wishes:
        if text.lower() not in ("y", "yes", "n", "no"):
            raise ConfigError("y or n, please")
        kept = tuple(source for source in wishes.sources if source not in files)
        return replace(wishes, sources=(*kept, BASETEN)) if text[0] in "yY" else wishes

    return _until_right("Ask the platform instead (y/n)", read, "n")


def _when_they_end(files: Sequence[str]) -> str:
    from loader.http.expiry import expiry
    from loader.stores.listing import parse_listings
    from loader.units import show_seconds

    ends = [
        end
        for file in files
        for listing in parse_listings(Path(file).read_bytes(), file)
        for artifact in listing.artifacts
        if (end := expiry(artifact.url)) is not None
    ]
    if not ends:
        return "may end"
    left = (min(ends) - datetime.now(UTC)).total_seconds()
    return f"end in {show_seconds(left)}" if left > 0 else "have ended already"


def _until_right(question: str, read: Callable[[str], _T], default: str | None = None) -> _T:
    """Return what *read* makes of the first answer that it takes; others are told what is wrong."""
    while True:
        try:
            return read(_ask(question, default))
        except LoaderError as error:
            _tell(error)


def _tell(error: LoaderError) -> None:
    step = f"; {error.next_step}" if error.next_step.startswith("did you mean") else ""
    say(f"  {error.line}{step}")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError("a number, please")
    return int(text)


def _ask(question: str, default: str | None = None) -> str:
    """Return an answer that is not empty. Raises EOFError at the end of the input."""
    from rich.console import Console
    from rich.prompt import Prompt

    console = Console(stderr=True)
    while True:
        try:
            told = (
                Prompt.ask(question, console=console)
                if default is None
                else Prompt.ask(question, default=default, console=console)
            )
        except BaseException:  # Ctrl-C or Ctrl-D, and the line that they are on
            console.print()
            raise
        if told and told.strip():
            return told.strip()
