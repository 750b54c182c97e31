"""What may stand on the command line, by argparse: it is there at once, and a download waits."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from loader import __version__
from loader.cli.completion import SHELLS
from loader.scaffold.selection import Selection

_ALIKE = 0.7  # so much alike is what was meant, by difflib


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Return ``command``, ``verbose`` and what that command's function takes.

    Raises:
        SystemExit: help or the version was asked for, or something is wrong: both were written.
    """
    own, behind = _split(words)
    Parser.as_json = "--json" in own
    parser = build_parser()
    if not own:
        parser.print_help()
        parser.exit(2)
    _check_command(parser, own)
    for word in own:
        if not word or (word.startswith("--") and word.partition("=")[1:] == ("=", "")):
            parser.error(f"an empty argument{' of ' + word[:-1] if word else ''}")
    given, unknown = parser.parse_known_args(own)
    found = vars(given)
    chosen: argparse.ArgumentParser = found.pop("parser")
    if "target" in found:
        if not any(word.startswith("-") for word in unknown):
            found["patterns"] += unknown  # argparse takes them in one place alone
            unknown = []
        found["selection"] = _selection(found)
    if found["command"] == "serve":
        found["vllm_arguments"] = behind
    elif found["command"] == "completion":
        found["words"] = behind
    else:
        unknown += behind
    if unknown:
        _refuse(chosen, unknown)
    return found


def _selection(found: dict[str, Any]) -> Selection:
    """Take out of *found* what says which files are meant."""
    return Selection(
        found.pop("target"),
        found.pop("config"),
        tuple(found.pop("artifacts")),
        found.pop("download_folder"),
        tuple(found.pop("jobs")),
        tuple(found.pop("checkpoints")),
        tuple(found.pop("patterns")),
    )


def _split(words: Sequence[str]) -> tuple[Sequence[str], list[str]]:
    """Return what is podloader's own, and what stands behind ``--``."""
    if "--" not in words:
        return words, []
    place = words.index("--")
    return words[:place], list(words[place + 1 :])


def _check_command(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuse a first word that is no command with the nearest one: argparse lists them all."""
    commands = (action for action in parser._actions if not action.option_strings)
    known = [name for action in commands for name in action.choices or ()]
    if list(words) == ["help"]:
        parser.print_help()
        parser.exit()
    own = [name for action in parser._actions for name in action.option_strings]
    before = iter(words)
    for word in before:
        if word == "--log-format":
            next(before, None)
        elif not word.startswith("-"):
            break
        elif word.partition("=")[0] not in own and not word.startswith("-v"):
            parser.error(f"unknown: {word}{_nearest(word, own)}")
    else:
        return
    if word not in known:
        hint = _nearest(word, known) or f"; choose from {', '.join(known)}"
        parser.error(f"there is no command {word}{hint}")


def _refuse(parser: argparse.ArgumentParser, unknown: list[str]) -> None:
    known = [name for action in parser._actions for name in action.option_strings]
    of_vllm = parser.prog.endswith(" serve") and unknown[0].startswith("-")
    hint = _nearest(unknown[0].partition("=")[0], known, 0.85 if of_vllm else _ALIKE)
    if not hint and of_vllm:
        hint = f"; vLLM's arguments stand behind --: podloader serve CONFIG -- {' '.join(unknown)}"
    parser.error(f"unknown: {' '.join(unknown)}{hint}")


def _nearest(word: str, known: Sequence[str], cutoff: float = _ALIKE) -> str:
    import difflib  # only mistakes need it

    near = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    if len(word) == 2 and word[0] == "-" and not near:  # the letter that others might mean
        near = [name for name in known if name.startswith(f"-{word}")][:1]
    return f"; did you mean {near[0]}?" if near else ""


_EXPLICIT = re.compile(r"(argument \S+): ignored explicit argument (.*)")
_USAGE = 2  # as argparse and ConfigError have it
_EXAMPLES = {
    "plan": ["plan my-truss", "plan checkpoints.json --checkpoint latest"],
    "fetch": [
        "fetch my-truss/config.yaml",
        "fetch checkpoints.json --output down rank-0/checkpoint-10/",
    ],
    "prepare": ["prepare my-truss", "prepare s3://bucket/job1 --output down --json"],
    "serve": ["serve config.yaml -- --port 8000 --max-model-len 8192"],
    "inspect": ["inspect checkpoints.json", "inspect s3://bucket/job1"],
    "merge": ["merge --base llama --adapter lora --output merged"],
    "consolidate": ["consolidate down/job1/rank-*/checkpoint-10 --output model"],
    "sums": ["sums down/job1/rank-0/checkpoint-10"],
    "clean": ["clean /tmp/training_checkpoints --keep 100GiB --dry-run"],
    "settings": ["settings config.yaml"],
    "env": ["env --json"],
    "truss init": [
        "truss init --artifacts checkpoints.json --output my-truss",
        "truss init --from truss_configs/my-model/config.yaml --output my-truss",
    ],
    "truss wheel": ["truss wheel my-truss"],
    "completion": ["completion bash"],
    "demo": ["demo --folder /tmp/demo"],
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and as the one JSON document where that is asked for."""

    as_json = False

    def error(self, message: str) -> NoReturn:
        """Raise SystemExit."""
        message = _EXPLICIT.sub(r"\1: it takes no value, got \2", message)
        help_ = f"{self.prog} --help"
        self._print_message(
            f"{self.prog}: error: {message}\n  next: `{help_}` says what it takes\n", sys.stderr
        )
        if Parser.as_json:
            from loader.cli.report import write_json

            write_json(
                {
                    "error": {
                        "error": "UsageError",
                        "what": message,
                        "where": "the command line",
                        "expected": "",
                        "got": "",
                        "problems": [],
                        "next_step": help_,
                    }
                }
            )
        raise SystemExit(_USAGE)


class _Commands:
    """Adds commands with what several of them share."""

    def __init__(self, parser: argparse.ArgumentParser, before: str = "") -> None:
        self._commands = parser.add_subparsers(metavar="COMMAND", required=True)
        self._before = before

    def add(self, name: str, told: str, *, config: bool = False) -> argparse.ArgumentParser:
        """Return the new command's parser; *config*: it is about a Truss config."""
        lines = [f"  podloader {line}" for line in _EXAMPLES.get(self._before + name, ())]
        parser = self._commands.add_parser(
            name,
            help=told,
            description=told,
            epilog="\n".join(["examples:", *lines]) if lines else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.set_defaults(command=self._before + name, parser=parser)
        _add_output_options(parser)
        if config:
            _add_selection(parser)
            _add_set(parser)
        return parser


def build_parser() -> argparse.ArgumentParser:
    """Return what knows every command and option."""
    parser = Parser(
        prog="podloader",
        description="From a training job's checkpoint storage to a vLLM that answers.",
        allow_abbrev=False,
    )
    version = f"podloader {__version__}"
    parser.add_argument(
        "-V", "--version", action="version", version=version, help="Print the version."
    )
    _add_output_options(parser)
    parser.set_defaults(verbose=False, quiet=False, log_format="text")
    commands = _Commands(parser)
    _add_plan(commands)
    _add_json(commands.add("fetch", "Download the files into download_folder.", config=True))
    told = "Fetch, consolidate, attach or merge; print the model that is ready."
    prepare = commands.add("prepare", told, config=True)
    ray = "Do so on each node of a Ray cluster, that of this machine or the one at ADDRESS."
    prepare.add_argument("--ray", metavar="ADDRESS", nargs="?", const="auto", help=ray)
    _add_timeline(prepare)
    _add_json(prepare)
    told = "Prepare, then be vLLM's OpenAI server; probes are answered from the first second."
    serve = commands.add("serve", told, config=True)
    serve.usage = "podloader serve CONFIG|SRC [options] [-- VLLM_ARGS]"
    serve.epilog = f"VLLM_ARGS are further arguments of `vllm serve`.\n\n{serve.epilog}"
    _add_timeline(serve)
    _add_inspect(commands)
    _add_merge(commands)
    _add_consolidate(commands)
    told = "Write a manifest of sums to lay beside a checkpoint; a fetch compares them."
    sums = commands.add("sums", told)
    sums.add_argument("folder", metavar="DIR", type=Path, help="The checkpoint's folder.")
    _add_json(sums)
    _add_clean(commands)
    trusses = _Commands(commands.add("truss", "Make Trusses."), "truss ")
    _add_init(trusses)
    wheel = trusses.add("wheel", "Put podloader itself into a Truss: no package index has it.")
    wheel.add_argument("truss", metavar="TRUSS", type=Path, help="A folder with a config.yaml.")
    _add_json(wheel)
    told = "Show every setting, its value, and where that came from."
    settings = commands.add("settings", told)
    settings.add_argument("config", metavar="CONFIG", type=Path, nargs="?", help="A Truss config.")
    _add_set(settings)
    _add_json(settings)
    told = "Show versions, device, caches and proxies, without secrets: for bug reports."
    _add_json(commands.add("env", told))
    told = "Print what lets a shell complete podloader's words."
    completion = commands.add("completion", told)
    completion.add_argument(
        "shell", metavar="SHELL", choices=SHELLS, help="Its name; the script says how to use it."
    )
    demo = commands.add("demo", "Do the whole job with a tiny model, trained on the spot.")
    told = "Where the demo keeps its files."
    demo.add_argument("--folder", metavar="DIR", type=Path, default=Path(".demo"), help=told)
    return parser


def _add_plan(commands: _Commands) -> None:
    told = "Show what would be fetched: files, sizes, total, free disk."
    parser = commands.add("plan", told, config=True)
    parser.add_argument(
        "--sizes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Ask the origin for sizes not listed.",
    )
    parser.add_argument("--nnodes", metavar="N", type=int, help="As `serve … -- --nnodes N`.")
    parser.add_argument("--node-rank", metavar="R", type=int, help="Show what this node takes.")
    _add_json(parser)


def _add_inspect(commands: _Commands) -> None:
    told = "Say what a checkpoint is, and what would be done with it."
    parser = commands.add("inspect", told)
    parser.add_argument(
        "source",
        metavar="PATH_OR_URL",
        help="A folder, one .safetensors file, a listing, s3://…, baseten:JOB, or an fsspec URL.",
    )
    _add_set(parser)
    _add_json(parser)


def _add_merge(commands: _Commands) -> None:
    parser = commands.add("merge", "Fold LoRA adapters into a base model's weights.")
    parser.add_argument("--base", metavar="DIR", required=True, help="The base model: a folder.")
    parser.add_argument(
        "--adapter",
        metavar="DIR[=WEIGHT]",
        action="append",
        required=True,
        help="A LoRA folder. Repeatable.",
    )
    _add_output(parser, "The folder to make.")
    parser.add_argument(
        "--exact",
        choices=["float32", "peft"],
        default="float32",
        help="Round once, from float32, or wherever PEFT rounds.",
    )
    parser.add_argument(
        "--combine",
        choices=["linear", "cat"],
        default="linear",
        help="How several adapters become one, as PEFT names it.",
    )
    parser.add_argument(
        "--dequantise",
        action="store_true",
        help="Take a quantised base, too: the result is in full precision.",
    )
    parser.add_argument("--allow-pickle", action="store_true", help="Read .bin weights too.")
    _add_json(parser)


def _add_consolidate(commands: _Commands) -> None:
    told = "Make one Hugging Face folder of weights that are sharded over ranks."
    parser = commands.add("consolidate", told)
    parser.add_argument(
        "source",
        metavar="SRC",
        nargs="+",
        type=Path,
        help="A folder with rank-*/ in it, or the checkpoint of each rank.",
    )
    _add_output(parser, "The folder to make.")
    parser.add_argument(
        "--dtype", help="bfloat16, float16 or float32; as trained where it is left out."
    )
    parser.add_argument(
        "--base",
        metavar="DIR",
        type=Path,
        help="The model that was trained: its config, where no rank has one.",
    )
    _add_json(parser)


def _add_clean(commands: _Commands) -> None:
    parser = commands.add("clean", "Remove old parts and records, and models down to a size.")
    told = "A download folder, or a Truss config.yaml that names it and its cache_folder."
    parser.add_argument("place", metavar="DIR_OR_CONFIG", type=Path, help=told)
    told = "What derived models and fetched bases may take together, the last used first. "
    parser.add_argument("--keep", metavar="SIZE", help=f"{told}Default: all.")
    told = "Leave parts and records that are younger. Default: 1."
    parser.add_argument("--older-than", metavar="DAYS", type=_days, default=1.0, help=told)
    parser.add_argument("--dry-run", action="store_true", help="Say what would go, and leave it.")
    _add_set(parser)
    _add_json(parser)


def _add_init(commands: _Commands) -> None:
    parser = commands.add("init", "Make the Truss that serves a training job's checkpoints.")
    told = "The Truss folder to make; asked for where there is a terminal."
    parser.add_argument("--output", metavar="DIR", type=Path, help=told)
    told = "A config.yaml that `truss train deploy_checkpoints` wrote, to take all that from."
    parser.add_argument("--from", dest="deployed", metavar="CONFIG", type=Path, help=told)
    several = [
        ("--artifacts", "SRC", "Where the checkpoints are listed."),
        ("--job-id", "JOB", "Checkpoints of this job only."),
        ("--checkpoint", "NAME", "A checkpoint by its folder, or latest; several for LoRA."),
        ("--env", "NAME=VALUE", "An environment variable."),
        (
            "--secret",
            "[VARIABLE=]NAME",
            "A secret of the platform, and a variable to put it into.",
        ),
    ]
    for name, metavar, told in several:
        parser.add_argument(name, metavar=metavar, action="append", help=f"{told} Repeatable.")
    one = [
        ("--name", "The model's name. Default: that of the base model or checkpoint."),
        ("--base-model", "The base model. Default: what the adapter's config names."),
        ("--accelerator", "GPUs, such as L4 or H100:2. Default: what the model needs."),
    ]
    for name, told in one:
        parser.add_argument(name, help=told)
    told = "Tokens of one request. Default: 8192, or what the model knows."
    parser.add_argument("--max-model-len", metavar="TOKENS", type=_positive, help=told)
    told = "Requests of that length to have room for at once."
    parser.add_argument("--requests", metavar="COUNT", type=_positive, default=4, help=told)
    parser.add_argument(
        "--interactive",
        action="store_true",
        default=True,
        help="Ask, where there is a terminal; this is the default.",
    )
    told = "Ask nothing."
    parser.add_argument("--non-interactive", dest="interactive", action="store_false", help=told)
    told = "Replace a Truss that is there."
    parser.add_argument("--overwrite", action="store_true", help=told)
    _add_json(parser)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add what may stand before or behind the command; what is not given stays as it was."""
    left = argparse.SUPPRESS
    told = "Say more; of a fetch, a line for each file."
    parser.add_argument("-v", "--verbose", action="store_true", default=left, help=told)
    told = "Say nothing but errors."
    parser.add_argument("-q", "--quiet", action="store_true", default=left, help=told)
    told = "How log lines look on standard error; json has time and level."
    parser.add_argument("--log-format", choices=["text", "json"], default=left, help=told)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    """Add what says which files are meant; ``Selection`` has its meaning."""
    told = "A Truss config.yaml or its folder; anything else is a source of artifacts."
    parser.add_argument("target", metavar="CONFIG|SRC", nargs="?", help=told)
    told = "Files of that source, such as rank-0/checkpoint-10/; as in artifact_references."
    parser.add_argument("patterns", metavar="PATTERN", nargs="*", help=told)
    told = "A Truss config, whatever its name."
    parser.add_argument("--config", metavar="FILE", type=Path, help=told)
    told = "A listing's path or URL, s3://…, baseten, or an fsspec URL. Repeatable."
    parser.add_argument("--artifacts", metavar="SRC", action="append", default=[], help=told)
    told = "Where the files go. Default: what the config says, or /tmp/training_checkpoints."
    names = ("--download-folder", "--output")
    parser.add_argument(*names, dest="download_folder", metavar="DIR", type=Path, help=told)
    told = "Files of this job only. Repeatable."
    parser.add_argument(
        "--job-id", dest="jobs", metavar="JOB", action="append", default=[], help=told
    )
    told = "A checkpoint by its folder, or latest. Repeatable."
    parser.add_argument(
        "--checkpoint", dest="checkpoints", metavar="NAME", action="append", default=[], help=told
    )


def _add_set(parser: argparse.ArgumentParser) -> None:
    told = "A setting, over the config. Repeatable."
    parser.add_argument("--set", dest="set_", metavar="NAME=VALUE", action="append", help=told)


def _add_json(parser: argparse.ArgumentParser) -> None:
    told = "Print one JSON document to standard output."
    parser.add_argument("--json", dest="as_json", action="store_true", help=told)


def _add_output(parser: argparse.ArgumentParser, told: str) -> None:
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help=told)


def _add_timeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeline",
        dest="timeline_file",
        metavar="FILE",
        type=_file_to_be,
        help="Write where the seconds went: a Chrome trace to FILE, a picture (.svg) beside it.",
    )


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = math.nan
    if not 0 <= days < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number that is not negative, got {text}")
    return days


def _file_to_be(text: str) -> Path:
    """Return the path of a file that can be made: found out now, not when all else is done."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.absolute().parent}")
    return path


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return int(text)
