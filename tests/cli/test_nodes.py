"""Many nodes on one terminal, and the words behind ``--ray``."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from loader.cli.node_bars import NodeBars
from loader.cli.nodes import check_words
from loader.errors import ConfigError
from loader.scaffold.selection import Selection


def test_each_node_has_a_row_and_lines_have_its_name() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, legacy_windows=False)
    with NodeBars(console) as bars:
        first, second, cluster = (bars.row(node) for node in ("10.0.0.1", "10.0.0.2", ""))
        cluster.wait_for("a placement group")
        for row in (first, second):
            row.start(2, 100, 0)
            row.advance(50, "a")
        first.finish_file("a")
        second.retry("b", "HTTP 503")
        with second.working("merged adapters:") as report:
            report(30, 60)
    shown = out.getvalue()
    for part in (
        "waiting for a placement group",
        "10.0.0.1 1/2 files",
        "10.0.0.2: asked for again: b: HTTP 503",
        "10.0.0.2 merged",
        "30/60 bytes",
    ):
        assert part in shown


def test_the_config_behind_ray_is_told(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    with pytest.raises(ConfigError) as error:
        check_words(Selection(), str(config))
    assert error.value.next_step == f"podloader prepare {config} --ray"
    check_words(Selection(str(config)), "auto")
    check_words(Selection(), "head:6379")


def test_the_command_says_that_no_cluster_is_there(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "config.yaml").write_text(
        "training_checkpoints:\n"
        "  artifact_references: [{training_job_id: job1, paths: [rank-0/x/]}]\n"
    )
    words = ["prepare", str(tmp_path), "--ray", "127.0.0.1:1", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "loader", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout)["error"]["where"] == "--ray 127.0.0.1:1"
