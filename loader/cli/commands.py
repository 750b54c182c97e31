"""The commands. Rooms are imported inside them, so that ``--help`` waits for none."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from loader import __version__
from loader.cli.report import errors_shown, say, set_up_logging, write_json
from loader.cli.truss import truss

if TYPE_CHECKING:
    from loader.settings import Settings

app = typer.Typer(
    name="podloader",
    help="From a training job's checkpoint storage to a vLLM that answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its tracebacks show local variables, signatures among them
    rich_markup_mode=None,
)
app.add_typer(truss, name="truss")

Config = Annotated[Path, typer.Argument(help="A Truss config.yaml.", metavar="CONFIG")]
Artifacts = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option(
        "--artifacts",
        metavar="SRC",
        help="A listing's path or URL, s3://…, baseten, or an fsspec URL. Repeatable.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to standard output.")]
Set = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", metavar="NAME=VALUE", help="A setting, over the config. Repeatable."),
]

Exact = Literal["float32", "peft"]
Combine = Literal["linear", "cat"]


TimelineFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--timeline",
        metavar="FILE",
        help="Write where the seconds went: a Chrome trace to FILE, a picture (.svg) beside it.",
    ),
]


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
) -> None:
    """From a training job's checkpoint storage to a vLLM that answers."""
    set_up_logging(verbose)
    if version:
        typer.echo(f"podloader {__version__}")
        raise typer.Exit


@app.command()
def plan(
    config: Config,
    artifacts: Artifacts = None,
    set_: Set = None,
    sizes: Annotated[
        bool, typer.Option("--sizes/--no-sizes", help="Ask the origin for sizes not listed.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Show what would be fetched: files, sizes, total, free disk."""
    from loader.cli.documents import plan_document
    from loader.cli.tables import show_plan

    with errors_shown(as_json):
        from loader import boot

        settings = _settings(config, artifacts, set_)
        manifest = boot.plan(settings, with_sizes=sizes)
        folder = settings.training.download_folder
        document = plan_document(manifest, folder, _free_bytes(folder))
        show_plan(manifest, folder, _free_bytes(folder))
        if as_json:
            write_json(document)


@app.command()
def fetch(
    config: Config, artifacts: Artifacts = None, set_: Set = None, as_json: Json = False
) -> None:
    """Download the files into the config's download_folder."""
    with errors_shown(as_json):
        from loader import boot
        from loader.cli.documents import fetch_document
        from loader.cli.progress import choose_progress
        from loader.cli.tables import show_snapshot

        snapshot = boot.fetch_files(_settings(config, artifacts, set_), choose_progress())
        show_snapshot(snapshot)
        if as_json:
            write_json(fetch_document(snapshot))


@app.command()
def prepare(
    config: Config,
    artifacts: Artifacts = None,
    set_: Set = None,
    timeline_file: TimelineFile = None,
    as_json: Json = False,
) -> None:
    """Fetch, consolidate, attach or merge; print the model that is ready."""
    with errors_shown(as_json):
        from loader import boot
        from loader.cli.documents import ready_document
        from loader.cli.progress import choose_progress
        from loader.cli.tables import show_ready
        from loader.cli.timelines import timeline_kept

        with timeline_kept(timeline_file) as timeline:
            ready = boot.prepare(_settings(config, artifacts, set_), choose_progress(), timeline)
            show_ready(ready)
        if as_json:
            write_json(ready_document(ready))


@app.command()
def serve(
    config: Config,
    vllm_arguments: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[-- VLLM_ARGS]", help="Further arguments of `vllm serve`."),
    ] = None,
    artifacts: Artifacts = None,
    set_: Set = None,
    timeline_file: TimelineFile = None,
) -> None:
    """Prepare, then be vLLM's OpenAI server; probes are answered from the first second."""
    with errors_shown(False):
        from loader.cli.pods import run_pod

        def load_settings() -> Settings:
            return _settings(config, artifacts, set_)

        code = run_pod(config, load_settings, vllm_arguments or (), timeline_file)
    raise typer.Exit(code)


@app.command()
def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH_OR_URL",
            help="A folder, a listing, s3://…, baseten:JOB, or an fsspec URL.",
        ),
    ],
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Say what a checkpoint is, and what would be done with it."""
    with errors_shown(as_json):
        from loader.cli.documents import checkpoints_document
        from loader.cli.tables import show_checkpoints
        from loader.remote import inspect_source
        from loader.settings import Settings

        checkpoints = inspect_source(source, Settings.without_config(_overrides(set_)))
        show_checkpoints(checkpoints)
        if as_json:
            write_json(checkpoints_document(checkpoints))


@app.command()
def merge(
    base: Annotated[str, typer.Option(help="The base model: a folder.")],
    adapter: Annotated[
        list[str], typer.Option(metavar="DIR[=WEIGHT]", help="A LoRA folder. Repeatable.")
    ],
    output: Annotated[Path, typer.Option(help="The folder to make.")],
    exact: Annotated[
        Exact, typer.Option(help="Round once, from float32, or wherever PEFT rounds.")
    ] = "float32",
    combine: Annotated[
        Combine, typer.Option(help="How several adapters become one, as PEFT names it.")
    ] = "linear",
    dequantise: Annotated[
        bool, typer.Option(help="Take a quantised base, too: the result is in full precision.")
    ] = False,
    allow_pickle: Annotated[bool, typer.Option(help="Read .bin weights too.")] = False,
    as_json: Json = False,
) -> None:
    """Fold LoRA adapters into a base model's weights."""
    with errors_shown(as_json):
        from loader.adapters.merge import WeightedAdapter
        from loader.adapters.merge import merge as merge_folders
        from loader.cli.documents import ready_document
        from loader.cli.tables import show_ready

        weighted = [WeightedAdapter(*_weighted(text)) for text in adapter]
        ready = merge_folders(
            Path(base),
            weighted,
            output,
            exact=exact,
            combine=combine,
            dequantise=dequantise,
            allow_pickle=allow_pickle,
        )
        show_ready(ready)
        if as_json:
            write_json(ready_document(ready))


@app.command()
def consolidate(
    source: Annotated[
        list[Path],
        typer.Argument(
            metavar="SRC...", help="A folder with rank-*/ in it, or the checkpoint of each rank."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder to make.")],
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="bfloat16, float16 or float32; as trained where it is left out."),
    ] = None,
    base: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The model that was trained: its config, where no rank has one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make one Hugging Face folder of weights that are sharded over ranks."""
    with errors_shown(as_json):
        from loader.cli.documents import consolidated_document
        from loader.cli.tables import show_consolidated
        from loader.sources import log_progress
        from loader.weights.consolidate.consolidation import consolidate as consolidate_folders
        from loader.weights.consolidate.places import find_sharded
        from loader.weights.inspect import open_checkpoint

        sharded = find_sharded(source)
        consolidate_folders(sharded, output, base=base, dtype=dtype, on_progress=log_progress())
        made = open_checkpoint(output)
        show_consolidated(sharded, made)
        if as_json:
            write_json(consolidated_document(sharded, made))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo keeps its files.")] = Path(".demo"),
) -> None:
    """Do the whole job with a tiny model, trained on the spot."""
    with errors_shown(False):
        from loader.cli.progress import choose_progress
        from loader.cli.tables import show_timeline
        from loader.demo.run import run

        show_timeline(run(folder, say, choose_progress))


def main() -> None:
    """Run the command line."""
    gc.set_threshold(100_000)  # a long listing is a million small objects that all stay
    app()


def _settings(config: Path, artifacts: list[str] | None, given: list[str] | None) -> Settings:
    from loader.settings import Settings

    overrides = _overrides(given) | ({"artifacts": tuple(artifacts)} if artifacts else {})
    return Settings.load(config, overrides=overrides)


def _overrides(given: list[str] | None) -> dict[str, Any]:
    """Return what ``--set`` gave."""
    from loader.errors import ConfigError
    from loader.settings import parse_value, setting_names, suggest

    overrides: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or name not in setting_names():
            raise ConfigError(
                "--set takes a setting and its value",
                expected="NAME=VALUE",
                got=name if equals else "no =",
                problems=[suggest(name, setting_names())] if equals else [],
            )
        overrides[name] = parse_value(name, value)
    return overrides


def _weighted(text: str) -> tuple[Path, float]:
    folder, equals, weight = text.rpartition("=")
    try:
        return (Path(folder), float(weight)) if equals else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def _free_bytes(folder: Path) -> int:
    """Return the room where *folder* is or would be made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
