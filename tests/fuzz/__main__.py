"""``python -m tests.fuzz [TARGET …] --seconds N``: fuzz by coverage, each target so long.

What leads somewhere new is kept in ``corpus/<target>/``; a finding is written beside it as
``finding-…`` and ends the run. Each target runs in a process of its own, which atheris (libFuzzer)
ends.
"""

from __future__ import annotations

import argparse
import logging
import re
import subprocess
import sys
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
_LONGEST_BYTES = 8192


def main() -> int:
    """Return 1 where one of the targets had a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        return _fuzz(options.targets[0], options.seconds, options.corpus)
    failed = 0
    for name in options.targets or _names():
        code, told = fuzz(name, options.seconds, options.corpus)
        print(f"{name:<10} {told}", flush=True)  # noqa: T201
        failed |= code != 0
    return failed


def fuzz(name: str, seconds: int, corpus: Path) -> tuple[int, str]:
    """Return the exit code, and how many inputs were tried or what was found."""
    command = [sys.executable, "-m", "tests.fuzz", name, "--in-process"]
    command += ["--seconds", str(seconds), "--corpus", str(corpus)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    tried = re.findall(r"^Done (\d+) runs", done.stderr, re.MULTILINE)
    if done.returncode == 0 and tried:
        kept = len(list((corpus / name).iterdir()))
        return 0, f"{int(tried[-1]):,} inputs without a finding; {kept} in the corpus"
    return done.returncode or 1, done.stdout[-2000:] + done.stderr[-4000:]


def _names() -> list[str]:
    from tests.fuzz.targets import TARGETS

    return list(TARGETS)


def _fuzz(name: str, seconds: int, corpus: Path) -> int:
    import atheris

    with atheris.instrument_imports(include=["loader"]):
        from tests.fuzz.targets import run
    logging.disable(logging.CRITICAL)
    folder = corpus / name
    folder.mkdir(parents=True, exist_ok=True)
    flags = [
        f"-max_total_time={seconds}",
        f"-max_len={_LONGEST_BYTES}",
        "-timeout=20",
        "-rss_limit_mb=3000",
        f"-artifact_prefix={folder}/finding-",
    ]
    atheris.Setup([sys.argv[0], *flags, str(folder)], lambda data: run(name, data))
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
