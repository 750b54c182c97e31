"""Bars of work: on a terminal, if it takes a while."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from rich.console import Console

from loader.cli import display
from loader.cli.bars import WorkBar
from loader.log_lines import set_up_logging


def shown(after_s: float, width: int) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width)
    with WorkBar("merged", console, after_s) as bar:
        for done in (1, 2_000_000, 3_000_000):
            bar.report(done, 3_000_000)
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 120])
def test_a_bar_of_what_takes_a_while(width: int) -> None:
    text = shown(0, width)
    assert "merged" in text
    assert "\u2501" in text


def test_no_bar_of_what_is_done_at_once() -> None:
    assert shown(60, 80) == ""


@pytest.mark.parametrize(("quiet", "bars"), [(False, True), (True, False)])
def test_no_bar_where_nothing_but_errors_is_to_be_said(
    monkeypatch: pytest.MonkeyPatch, quiet: bool, bars: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    logger = logging.getLogger("podloader")
    before = (logger.level, logger.handlers[:], logger.propagate)
    set_up_logging(quiet=quiet)
    try:
        assert display._has_bars() is bars
    finally:
        logger.setLevel(before[0])
        logger.handlers[:], logger.propagate = before[1], before[2]
