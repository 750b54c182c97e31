"""The commands. Rooms are imported inside them, so that ``--help`` waits for none."""

from __future__ import annotations

import gc
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loader.cli.ending import ending
from loader.cli.parser import parse
from loader.cli.report import errors_shown, set_up_report, show, write_json
from loader.log_lines import set_up_logging
from loader.scaffold.selection import LATEST, Selection

if TYPE_CHECKING:
    from loader.adapters.combine import Combination
    from loader.adapters.fold import Exact

Words = list[str] | None


def plan(
    selection: Selection,
    set_: Words,
    sizes: bool,
    as_json: bool,
    nnodes: int | None = None,
    node_rank: int | None = None,
) -> None:
    """Show what a start would fetch and do, and whether there is room for it."""
    with errors_shown(as_json):
        from loader import boot
        from loader.cli.display import choose_progress

        progress = choose_progress()
        settings = selection.settings(_overrides(set_), progress)
        given = {"nnodes": nnodes, "node_rank": node_rank}
        node = {name: value for name, value in given.items() if value is not None}
        if node:
            from loader.pod.place import Place
            from loader.serve.vllm.arguments import written

            settings = replace(settings, engine_args=settings.engine_args | node)
            Place.read(written(settings.engine_args))
        found = boot.look_ahead(settings, progress, with_sizes=sizes)

        from loader.cli.documents import plan_document
        from loader.cli.tables import show_plan

        folder = settings.training.download_folder
        show_plan(found, folder, _free_bytes(folder))
        if as_json:
            write_json(plan_document(found, folder, _free_bytes(folder)))


def fetch(selection: Selection, set_: Words, as_json: bool, *, verbose: bool = False) -> None:
    """Download the files into the config's download_folder."""
    with errors_shown(as_json):
        from loader import boot
        from loader.cli.display import choose_progress
        from loader.peers import serve_peers_on

        progress = choose_progress()
        settings = selection.settings(_overrides(set_), progress)
        snapshot = boot.fetch_files(settings, progress)

        from loader.cli.documents import fetch_document
        from loader.cli.tables import show_snapshot

        show_snapshot(snapshot, each=verbose)
        if as_json:
            write_json(fetch_document(snapshot))
        serve_peers_on(settings, wait=True)


def prepare(
    selection: Selection, set_: Words, ray: str | None, timeline_file: Path | None, as_json: bool
) -> None:
    """Fetch, consolidate, attach or merge; print the model that is ready, *ray*: on each node."""
    with errors_shown(as_json):
        if ray is not None:
            from loader.cli.nodes import check_words, prepare_nodes

            check_words(selection, ray)
        from loader import boot
        from loader.cli.display import choose_progress
        from loader.cli.documents import ready_document
        from loader.cli.tables import show_ready
        from loader.cli.timelines import timeline_kept
        from loader.peers import serve_peers_on

        with timeline_kept(timeline_file) as timeline:
            progress = choose_progress()
            settings = selection.settings(_overrides(set_), progress, default=[LATEST])
            if ray is not None:
                models = prepare_nodes(settings, ray, timeline)
            else:
                ready = boot.prepare(settings, progress, timeline)
                show_ready(ready)
        if ray is not None:
            if as_json:
                write_json({"nodes": {node: ready_document(m) for node, m in models.items()}})
            return
        if as_json:
            write_json(ready_document(ready))
        serve_peers_on(settings, wait=True)


def serve(
    selection: Selection,
    set_: Words,
    timeline_file: Path | None,
    vllm_arguments: list[str],
) -> None:
    """Prepare, then be vLLM's OpenAI server; probes are answered from the first second."""
    with errors_shown(False):
        from loader.cli.display import choose_progress
        from loader.cli.pods import run_pod
        from loader.errors import ConfigError

        settings = selection.settings(_overrides(set_), choose_progress(), default=[LATEST])
        if settings.adapter_jobs and selection.config_file is None:
            raise ConfigError(
                "adapter_jobs without a config",
                expected="a Truss config.yaml, which the engine's processes read as well",
                next_step="write one; `podloader truss init` does",
            )
        code = run_pod(selection.config_file, settings, vllm_arguments, timeline_file)
    sys.exit(code)


def inspect(source: str, set_: Words, as_json: bool) -> None:
    """Say what a checkpoint is, and what would be done with it."""
    with errors_shown(as_json):
        from loader.cli.display import choose_progress
        from loader.cli.documents import checkpoints_document, file_document
        from loader.cli.tables import show_checkpoints, show_file
        from loader.config.settings import Settings
        from loader.prepare.remote import inspect_source

        if (path := Path(source)).suffix == ".safetensors" and path.is_file():
            from loader.weights.header import read_header

            header = read_header(path)
            show_file(path, header)
            if as_json:
                write_json(file_document(path, header))
            return
        settings = Settings.without_config(_overrides(set_))
        checkpoints = inspect_source(source, settings, choose_progress())
        show_checkpoints(checkpoints)
        if as_json:
            write_json(checkpoints_document(checkpoints))


def merge(
    base: str,
    adapter: list[str],
    output: Path,
    exact: Exact,
    combine: Combination,
    dequantise: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Fold LoRA adapters into a base model's weights."""
    with errors_shown(as_json):
        from loader.cli.display import choose_progress
        from loader.cli.documents import ready_document
        from loader.cli.tables import show_ready
        from loader.prepare.wholeness import WholenessCheck
        from loader.timeline import Timeline

        with (
            WholenessCheck(Timeline(), ahead=True) as whole,
            choose_progress().working("merged") as report,
        ):
            whole.begin(base, Path(base))
            from loader.adapters.merge import WeightedAdapter
            from loader.adapters.merge import merge as merge_folders

            weighted = [WeightedAdapter(*_weighted(text)) for text in adapter]
            ready = merge_folders(
                Path(base),
                weighted,
                output,
                exact=exact,
                combine=combine,
                dequantise=dequantise,
                allow_pickle=allow_pickle,
                on_progress=report,
                prove=whole.wait,
            )
        show_ready(ready)
        if as_json:
            write_json(ready_document(ready))


def consolidate(
    source: list[Path], output: Path, dtype: str | None, base: Path | None, as_json: bool
) -> None:
    """Make one Hugging Face folder of weights that are sharded over ranks."""
    with errors_shown(as_json):
        from loader.weights.formats.learning import learning_names

        with learning_names() as learn:
            from loader.cli.display import choose_progress
            from loader.cli.documents import consolidated_document
            from loader.cli.tables import show_consolidated

            with choose_progress().working("consolidated") as report:
                from loader.weights.formats.consolidation import consolidate as consolidate_folders
                from loader.weights.formats.places import find_sharded
                from loader.weights.inspect import open_checkpoint

                sharded = find_sharded(source)
                consolidate_folders(
                    sharded, output, base=base, dtype=dtype, on_progress=report, learn=learn
                )
        made = open_checkpoint(output)
        show_consolidated(sharded, made)
        if as_json:
            write_json(consolidated_document(sharded, made))


def sums(folder: Path, as_json: bool) -> None:
    """Write a manifest of sums to lay beside a checkpoint."""
    with errors_shown(as_json):
        from loader.cli.display import choose_progress
        from loader.cli.documents import sums_document
        from loader.fetch.sum_manifests import sum_folder

        with choose_progress().working("summed up") as report:
            path, found = sum_folder(folder, report)
        show(f"{len(found)} files in {path}")
        if as_json:
            write_json(sums_document(path, found))


def clean(
    place: Path, set_: Words, keep: str | None, older_than: float, dry_run: bool, as_json: bool
) -> None:
    """Remove old parts and records, and models down to a size."""
    with errors_shown(as_json):
        from loader.cli.display import choose_progress
        from loader.cli.documents import cleaned_document
        from loader.cli.tables import show_cleaned
        from loader.config.paths import suggest_path
        from loader.errors import ConfigError
        from loader.prepare.cleaning import clean as clean_folders
        from loader.prepare.consolidated import cache_folder, models_folder

        if place.is_dir() and Selection(str(place)).config_file is None:
            root, cache = place, models_folder(place)
        elif not place.exists():
            raise ConfigError(
                "nothing lies there",
                where=str(place.absolute()),
                expected="a download folder, or a Truss config.yaml",
                next_step=suggest_path(place, "give the folder that a fetch went to"),
            )
        else:
            settings = Selection(config=place).settings(_overrides(set_))
            root, cache = settings.training.download_folder, cache_folder(settings)
        keep_bytes = _bytes("--keep", keep) if keep is not None else None
        with choose_progress().step("clean"):
            cleaned = clean_folders(
                root, cache, keep_bytes=keep_bytes, older_than_days=older_than, dry_run=dry_run
            )
        show_cleaned(cleaned, dry_run=dry_run)
        if as_json:
            write_json(cleaned_document(cleaned))


def settings(config: Path | None, set_: Words, as_json: bool) -> None:
    """Show every setting, its value, and where that came from."""
    with errors_shown(as_json):
        from loader.cli.bug_report import setting_rows
        from loader.config.settings import Settings

        over, file = _overrides(set_), Selection(config=config).config_file
        found = Settings.load(file, overrides=over) if file else Settings.without_config(over)
        rows = setting_rows(found)
        width = max(len(name) for name, _, _ in rows)
        for name, value, origin in rows:
            show(f"{name:{width}}  {value}" + (f"  (from {origin})" if origin else ""))
        if as_json:
            write_json(
                {"settings": [dict(zip(("name", "value", "from"), r, strict=True)) for r in rows]}
            )


def env(as_json: bool) -> None:
    """Show versions, device, caches and proxies."""
    with errors_shown(as_json):
        from loader.cli.bug_report import describe_surroundings

        found = describe_surroundings()
        for name, value in found.items():
            show(f"{name:20}  {value}")
        if as_json:
            write_json({"env": found})


def demo(folder: Path) -> None:
    """Do the whole job with a tiny model, trained on the spot."""
    with errors_shown(False):
        from loader.cli.display import choose_progress
        from loader.cli.tables import show_timeline
        from loader.demo.run import run

        show_timeline(run(folder, show, choose_progress))


def completion(shell: str, words: list[str]) -> None:
    """Print a script for a shell, or what may come next where it asks."""
    from loader.cli.completion import completion as text_for

    sys.stdout.write(text_for(shell, words))


def truss_init(**given: Any) -> None:
    """Make the Truss that serves a training job's checkpoints."""
    from loader.cli.scaffold import Options, init

    init(Options(**given))


def truss_wheel(truss: Path, as_json: bool) -> None:
    """Put podloader's own wheel into a Truss."""
    with errors_shown(as_json):
        from loader.scaffold.wheel import add_wheel, lines_to_add

        made = add_wheel(truss)
        show(str(made))
        for line in lines_to_add(truss):
            show(line)
        if as_json:
            write_json({"wheel": str(made)})


_COMMANDS: Mapping[str, Callable[..., None]] = {
    "plan": plan,
    "fetch": fetch,
    "prepare": prepare,
    "serve": serve,
    "inspect": inspect,
    "merge": merge,
    "consolidate": consolidate,
    "sums": sums,
    "clean": clean,
    "truss init": truss_init,
    "truss wheel": truss_wheel,
    "settings": settings,
    "env": env,
    "completion": completion,
    "demo": demo,
}


def main() -> None:
    """Run the command line."""
    with ending():
        gc.set_threshold(100_000)  # a long listing is a million small objects that all stay
        # A process below, vLLM's as well, takes no file of the working folder for a module.
        os.environ["PYTHONSAFEPATH"] = "1"
        given = parse(sys.argv[1:])
        command, verbose, quiet = (given.pop(name) for name in ("command", "verbose", "quiet"))
        logged = given.pop("log_format") == "json"
        set_up_logging(verbose=verbose, quiet=quiet, as_json=logged)
        set_up_report(as_json=given.get("as_json", False), quiet=quiet, logged=logged)
        if command == "fetch":
            given["verbose"] = verbose
        _COMMANDS[command](**given)


def _overrides(given: Words) -> dict[str, Any]:
    """Return what ``--set`` gave."""
    from loader.config.settings import parse_value, setting_names, suggest
    from loader.errors import ConfigError

    overrides: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or name not in setting_names():
            raise ConfigError(
                "--set takes a setting and its value",
                expected="NAME=VALUE",
                got=name if equals else f"{name} without a value",
                problems=[] if name in setting_names() else [suggest(name, setting_names())],
                next_step="`podloader settings` lists them",
            )
        overrides[name] = parse_value(name, value)
    return overrides


def _bytes(name: str, text: str) -> int:
    from loader.config.values import Bytes, read_value
    from loader.errors import ConfigError

    try:
        count: int = read_value(text, Bytes)
    except ValueError as error:
        told = str(error).removeprefix("expected ")
        raise ConfigError("not a size", where=name, expected=told, got=text) from None
    return count


def _weighted(text: str) -> tuple[Path, float]:
    """Return the folder and the weight that ``--adapter`` gave."""
    from loader.errors import ConfigError

    folder, equals, factor = text.rpartition("=")
    try:
        weight = float(factor)
    except ValueError:
        weight = math.nan
        if Path(text).is_dir() or not Path(folder).is_dir():  # "=" is part of a name
            weight, equals = 1.0, ""
    if equals and not math.isfinite(weight):
        raise ConfigError(
            "an adapter's weight that is no number to multiply by",
            where="--adapter",
            expected="a finite number, such as 0.5",
            got=factor,
            next_step="give FOLDER=WEIGHT, or FOLDER alone",
        )
    return (Path(folder), weight) if equals else (Path(text), 1.0)


def _free_bytes(folder: Path) -> int:
    """Return the room where *folder* is or would be made."""
    from loader.prepare.forecast import existing

    return shutil.disk_usage(existing(folder)).free
