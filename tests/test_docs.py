"""What people read: every link leads somewhere, every command runs, every table is the code's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loader import errors
from loader.cli.commands import _COMMANDS
from loader.errors import LoaderError
from loader.prepare.engine_start import FROM_FILES
from loader.status.metrics import exposition
from loader.status.state import Boot
from loader.timeline import Span
from tests.readme import JOB, README, ROOT, World, blocks, is_shown, steps, world

PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCED = re.compile(r"```.*?```", re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return what GitHub makes of the headings of *page*."""
    headings = re.findall(r"^#+ (.*)$", _FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCED.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_first() -> None:
    links = set(_LINK.findall(README.read_text()))
    assert {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} <= links


def test_the_first_page_is_read_in_one_sitting() -> None:
    assert len(README.read_text().splitlines()) < 300


def run_blocks(found: World, *, engine: bool) -> None:
    for block in blocks(README.read_text(encoding="utf-8"), engine=engine):
        for command, shown in steps(block):
            told = found.run(command)
            assert is_shown(shown, told), f"$ {command}\n{told}\n--- README has\n{shown}"


def test_what_readme_shows_is_what_happens(tmp_path: Path) -> None:
    with world(tmp_path) as found:
        found.run(f"truss train get_checkpoint_urls --job-id {JOB}")
        run_blocks(found, engine=False)


@pytest.mark.engine
def test_five_lines_from_a_listing_to_an_answer(tmp_path: Path) -> None:
    with world(tmp_path) as found:
        run_blocks(found, engine=True)


@pytest.mark.engine
def test_the_demo_trains_serves_and_asks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loader", "demo", "--folder", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = re.findall(r"^    (base|fine-tuned) +(.+)$", done.stdout, re.MULTILINE)
    assert answers
    assert {name for name, _ in answers} == {"base", "fine-tuned"}
    assert all(one[1] != other[1] for one, other in zip(answers[::2], answers[1::2], strict=True))


def test_an_output_that_differs_is_seen() -> None:
    assert is_shown("6 files, ... in 0.1 s\n", "6 files, all of them in 12 s\n")
    assert not is_shown("6 files\n", "7 files\n")


def other_commands() -> Iterator[str]:
    """Yield the commands of every page that need Docker, a cluster, make or pip."""
    for page in PAGES:
        for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            yield from block.replace("\\\n", " ").splitlines()


def test_what_cannot_be_run_here_names_what_is_there() -> None:
    makes = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    seen = set()
    for line in other_commands():
        seen |= {line.split()[0]} if line.strip() else set()
        if line.startswith("make "):
            assert line.split()[1] in makes
        for path in re.findall(r"(?:\./)?deploy/[\w./-]+", line):
            assert (ROOT / path).exists(), line
    assert {"make", "docker", "pip"} <= seen


def rows(page: str) -> list[list[str]]:
    """Return the cells of every table's rows on a page of docs/."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("| ")]
    return [line.split(" | ") for line in lines]


def test_every_metric_is_described() -> None:
    boot = Boot("ready", "", 2.0, ready_s=1.0, spans=(Span("fetch", 0.0, 1.0),))
    exported = {
        (sample.name, family.type, family.documentation)
        for family in text_string_to_metric_families(exposition(boot).decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    assert {(r[0].strip("`"), r[1], r[2]) for r in rows("metrics.md")[1:]} == exported


def test_every_command_is_described() -> None:
    text = (ROOT / "docs/command-line.md").read_text()
    for command in _COMMANDS:
        assert re.search(rf"^\| `podloader {command}[ `]", text, re.MULTILINE), command


def test_every_exit_code_is_that_of_its_error() -> None:
    told = {
        name: int(row[0])
        for row in rows("failures.md")
        if row[0].isdigit() and len(row) == 3
        for name in re.findall(r"`(\w+Error)`", row[1])
    }
    own = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, LoaderError)]
    families = [error for error in own if error.__bases__ == (LoaderError,)]
    assert told == {e.__name__: e.exit_code for e in families if e.exit_code != 1}


def test_every_reason_to_wait_for_whole_files_is_told() -> None:
    page = " ".join((ROOT / "docs/failures.md").read_text(encoding="utf-8").split())
    assert all(why in page for why in FROM_FILES)


def test_the_documents_name_their_keys() -> None:
    """`/health` as the page shows it has what it really has."""
    from loader.status.replies import health

    (shown,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/http.md").read_text(), re.DOTALL)
    assert json.loads(shown).keys() == health(Boot("starting", "", 0.0)).keys()
