"""What a shell completes, as its user meets it: keys go in at a terminal, words come out."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loader.cli.completion import SHELLS, complete, completion
from loader.cli.parser import build_parser


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("f", ["fetch"]),
        ("fetch --lo", ["--log-format"]),
        ("fetch --log-format ", ["text", "json"]),
        ("fetch --log-format = te", ["text"]),
        ("fetch --log-format=te", ["--log-format=text"]),
        ("-q fe", ["fetch"]),
        ("--log-format json fe", ["fetch"]),
        ("truss i", ["init"]),
        ("truss init --acc", ["--accelerator"]),
        ("prepare c.yaml --set ver", ["verify="]),
        ("merge --exact ", ["float32", "peft"]),
        ("completion b", ["bash"]),
        ("plan --output ", []),
        ("plan che", []),
        ("serve c.yaml -- --po", []),
        ("unheard-of --ver", ["--version", "--verbose"]),
    ],
)
def test_what_may_come_next(typed: str, words: list[str]) -> None:
    assert [found.word for found in complete(build_parser(), typed.split(" "))] == words


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_short_and_a_line_is_what_the_shell_reads(shell: str) -> None:
    assert f"podloader completion {shell}" in completion(shell, [])
    (line,) = completion(shell, ["cle"]).splitlines()
    told = "Remove old parts and records, and models down to a size"
    assert line == {"bash": "clean", "zsh": f"clean:{told}", "fish": f"clean\t{told}"}[shell]


STARTS = {
    "bash": (["--norc", "-i"], "bind 'set enable-bracketed-paste off'\n"),
    "zsh": (["-f", "-i"], "autoload -Uz compinit && compinit -u -D\n"),
    "fish": (["--no-config", "-i"], ""),
}
SOURCE = {
    "bash": 'eval "$(podloader completion bash)"\n',
    "zsh": 'eval "$(podloader completion zsh)"\n',
    "fish": "podloader completion fish | source\n",
}


@pytest.mark.parametrize("shell", SHELLS)
def test_in_the_shell_itself(shell: str, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "checkpoints.json").write_text("[]")
    leader, follower = pty.openpty()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options, setup = STARTS[shell]
    process = subprocess.Popen(
        ["setsid", "--ctty", program, *options],  # fish wants a terminal of its own
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "TERM": "xterm", "HOME": str(tmp_path), "PS1": "$ "},
    )
    os.close(follower)
    try:
        os.write(leader, (setup + SOURCE[shell] + "echo rea''dy\n").encode())
        read_until(leader, r"\nready|\rready")
        for typed, wanted in (
            ("podloader fet\t", "podloader fetch "),
            ("podloader truss in\t", "podloader truss init "),
            ("podloader prepare --set verif\t", "verify="),
            ("podloader plan check\t", "checkpoints.json"),
        ):
            os.write(leader, typed.encode())
            read_until(leader, re.escape(wanted))
            os.write(leader, b"\x15")  # the line is taken back
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def read_until(leader: int, pattern: str) -> None:
    """Read what the shell shows, without its commands to the terminal, until it fits."""
    shown, limit = "", time.monotonic() + 60
    while time.monotonic() < limit:
        if select.select([leader], [], [], 0.2)[0]:
            shown += os.read(leader, 1 << 16).decode(errors="replace")
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()=>].?|\x08", "", shown)
        if re.search(pattern, plain):
            return
    pytest.fail(f"{pattern!r} is not in {shown!r}")
