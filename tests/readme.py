"""README's commands, run as it shows them; ``python -m tests.readme`` writes their output anew.

A block of ``console`` holds commands behind ``$`` and what they print: standard output, and
standard error where they fail. ``...`` stands for anything. Before a block that needs an engine
stands ``<!-- engine -->``; a command that ends in ``&`` runs until the blocks are over.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import FaultyOrigin, serving
from tests.pod.pods import ENGINE_ARGS, free_port

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
JOB = "abc123"
BLOCK = re.compile(r"((?:<!-- engine -->\n)?```console\n)(.*?)(```\n)", re.DOTALL)
_STEP = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
_MASKS = (
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC"), "DATE"),
    (re.compile(r"\d[\d.]* min \d+ s|\d[\d.]* ?(s|min)\b"), "N s"),
    (re.compile(r"\d[\d.]* (B|kB|MB|GB|TB)\b"), "N B"),
    (re.compile(r"\d[\d.]*%"), "N%"),
    (re.compile(r"[ \t]+"), " "),
)

# What `truss` itself writes, with the platform's answers made here.
_TRUSS = """#!{python}
import json, pathlib, types
from truss.cli.train.core import download_checkpoint_artifacts
listing = json.loads(pathlib.Path({listing!r}).read_text())
project = {{"id": "p1", "name": "my project"}}
api = types.SimpleNamespace(
    search_training_jobs=lambda **_: [{{"id": {job!r}, "training_project": project}}],
    get_training_job_checkpoint_presigned_url=lambda **_: listing["checkpoint_artifacts"],
)
path = download_checkpoint_artifacts(types.SimpleNamespace(api=api), {job!r})
print(f"✨ Training job checkpoint artifacts downloaded to {{path}}")
"""


class World:
    """A folder as README's reader has it, and an origin that the listing leads to."""

    def __init__(self, folder: Path, origin: FaultyOrigin) -> None:
        self.folder = folder
        self.port = free_port()
        self._running: list[subprocess.Popen[bytes]] = []
        own = folder / ".own"
        own.mkdir(parents=True)
        for name in ("checkpoint-50", "checkpoint-100"):
            tiny_llama(origin.folder(JOB) / name)
        train_or_draw_lora(origin.folder(JOB) / name, folder / "lora", spread=0.3)
        shutil.copytree(ROOT / "truss_templates", folder / "truss_templates")
        listing = own / "listing.json"
        listing.write_text(json.dumps(origin.listing(JOB)))
        truss = own / "truss"
        truss.write_text(_TRUSS.format(python=sys.executable, listing=str(listing), job=JOB))
        truss.chmod(0o755)
        self._environment = {
            **os.environ,
            "PATH": f"{own}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "COLUMNS": "100",
            "PYTHONWARNINGS": "ignore",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }

    def run(self, command: str) -> str:
        """Return what *command* prints, as README shows it."""
        command = command.replace("8000", str(self.port))
        if command.endswith("&"):
            command = f"{command[:-1]} -- --port {self.port}"  # vLLM's own may be taken
            variables = {"PODLOADER_ENGINE_ARGS": json.dumps(ENGINE_ARGS)}
            with (self.folder / ".own" / "background.log").open("wb") as log:
                started = subprocess.Popen(
                    ["bash", "-c", f"exec {command}"],
                    cwd=self.folder,
                    env={**self._environment, **variables},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            self._running.append(started)
            return ""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
        text = done.stdout + (done.stderr if done.returncode else "")
        if text and not text.endswith("\n"):
            text += "\n"
        return text.replace(str(self.folder), "...").replace(str(self.port), "8000")

    def close(self) -> None:
        """End what runs in the background."""
        for process in self._running:
            process.send_signal(signal.SIGINT)
            process.wait(60)


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """Give a world in *folder*."""
    with serving(folder / "origin") as origin:
        found = World(folder / "home", origin)
        try:
            yield found
        finally:
            found.close()


def blocks(text: str, *, engine: bool) -> list[str]:
    """Return the blocks that need an engine, or those that need none."""
    return [b[2] for b in BLOCK.finditer(text) if b[1].startswith("<!--") == engine]


def steps(block: str) -> list[tuple[str, str]]:
    """Return each command and what is shown of its output."""
    return [(step[1], step[2]) for step in _STEP.finditer(block)]


def is_shown(shown: str, told: str) -> bool:
    """Return whether *told* is what *shown* says, whatever the times and sizes of the machine."""
    parts = [re.escape(_masked(part)) for part in shown.split("...")]
    return re.fullmatch(".*?".join(parts), _masked(told), re.DOTALL) is not None


def _masked(text: str) -> str:
    for pattern, put in _MASKS:
        text = pattern.sub(put, text)
    return text


def _renew(block: re.Match[str], found: World) -> str:
    lines = []
    for command, shown in steps(block[2]):
        told = found.run(command)
        lines.append(f"$ {command}\n")
        lines.append(shown if shown != "...\n" and is_shown(shown, told) else told)
    return "".join([block[1], *lines, block[3]])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary, world(Path(temporary)) as here:
        old = README.read_text(encoding="utf-8")
        README.write_text(BLOCK.sub(lambda block: _renew(block, here), old), encoding="utf-8")
