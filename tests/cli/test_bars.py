"""Bars of work: on a terminal, if it takes a while."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from loader.cli import display
from loader.cli.bars import BarProgress
from loader.cli.node_bars import NodeBars
from loader.fetch.progress import LogProgress
from loader.log_lines import set_up_logging

SHOWN, HIDDEN = "\x1b[?25h", "\x1b[?25l"  # the cursor


def terminal(width: int) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=width), out


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in range(1000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("never")


def shown(after_s: float, width: int) -> str:
    console, out = terminal(width)
    with BarProgress(console, after_s).working("merged") as report:
        for done in (1, 2_000_000, 3_000_000):
            report(done, 3_000_000)
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 120])
def test_a_bar_of_what_takes_a_while(width: int) -> None:
    text = shown(0, width)
    assert "merged" in text
    assert ("\u2501" in text) is (width > 40)
    assert "3.0/3.0 MB" in text, "whole, not cut or wrapped"


def test_no_bar_of_what_is_done_at_once() -> None:
    assert shown(60, 80) == ""


@pytest.mark.parametrize("width", [40, 120])
def test_work_goes_on_beside_a_download_and_after_it(width: int) -> None:
    console, out = terminal(width)
    progress = BarProgress(console, after_s=0)
    progress.start(2, 100, 0)
    with progress.working("proved job1/rank-0/model-00001-of-00002.safetensors:") as report:
        report(1, 2)
        progress.advance(100, "a")
        progress.finish()
        report(2, 2)
        assert out.getvalue().count(HIDDEN) == 1, "one display for both"
    report(2, 2)
    text = out.getvalue()
    assert "proved" in text
    assert "tensors" in text, "the end of the name"
    assert "bytes" in text
    assert text.count(HIDDEN) == text.count(SHOWN) == 1
    with progress.working("merged") as report:
        report(1, 2)
    after = out.getvalue()[len(text) :]
    assert "merged" in after
    assert "files" not in after, "the bar of what is over"


def test_work_that_fails_gives_the_terminal_back() -> None:
    console, out = terminal(80)

    def fail() -> None:
        with BarProgress(console, 0).working("merged") as report:
            report(1, 2)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert out.getvalue().count(HIDDEN) == out.getvalue().count(SHOWN) == 1


def test_a_wait_is_a_line() -> None:
    console, out = terminal(80)
    progress = BarProgress(console)
    for _ in range(3):
        progress.wait_for("another process")
    progress.wait_for("")
    assert out.getvalue() == "waiting for another process\n"


@pytest.mark.parametrize(("quiet", "bars"), [(False, True), (True, False)])
def test_no_bar_where_nothing_but_errors_is_to_be_said(
    monkeypatch: pytest.MonkeyPatch, quiet: bool, bars: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    logger = logging.getLogger("podloader")
    before = (logger.level, logger.handlers[:], logger.propagate)
    set_up_logging(quiet=quiet)
    try:
        assert isinstance(display.choose_progress(), BarProgress if bars else LogProgress)
    finally:
        logger.setLevel(before[0])
        logger.handlers[:], logger.propagate = before[1], before[2]


@pytest.mark.parametrize("width", [40, 120])
def test_a_step_shows_itself_after_a_while_and_leaves_nothing(width: int) -> None:
    console, out = terminal(width)
    with BarProgress(console, 0.05).step("listing") as tell:
        wait_until(lambda: "listing" in out.getvalue())  # though nobody told anything
        tell("12,000 files")
        wait_until(lambda: "listing  12,000 files" in out.getvalue())
        assert "0.00 s" in out.getvalue() or "0.0" in out.getvalue(), "for how long"
        assert "bytes" not in out.getvalue()
    tell("13,000 files")
    assert out.getvalue().endswith("\x1b[1A\x1b[2K"), "its line is taken away"
    assert "13,000" not in out.getvalue()


def test_a_step_that_is_done_at_once_is_not_shown() -> None:
    console, out = terminal(80)
    with BarProgress(console, 60).step("listing") as tell:
        tell("1 files")
    assert out.getvalue() == ""


FORGED = "x\nFORGED\x1b[31m\u202e\u2028[bold]y?X-Amz-Signature=S3CR3T"


def test_nobody_forges_a_line_above_the_bars_or_beside_one() -> None:
    console, out = terminal(200)
    bars = BarProgress(console, after_s=0)
    bars.start(1, 1 << 30, 0)
    bars.begin_file(FORGED, 1 << 30, 0)
    bars.retry(FORGED, FORGED)
    bars.wait_for(FORGED)
    with bars.working(f"merged {FORGED}") as report:
        report(1, 2)
    bars.finish()
    console, nodes_out = terminal(200)
    with NodeBars(console) as nodes:
        row = nodes.row(FORGED)
        row.start(1, 9, 0)
        row.retry(FORGED, FORGED)
        row.wait_for(FORGED)
        with row.working(FORGED) as report:
            report(1, 2)
    for text in (out.getvalue(), nodes_out.getvalue()):
        assert "x\\nFORGED\\x1b[31m\\u202e\\u2028[bold]" in text
        assert not set(text) & set("\u202e\u2028")
        assert "\nFORGED" not in text
        assert "FORGED\x1b" not in text
        assert "S3CR3T" not in text
