"""``podloader prepare --ray``: all nodes in one table, their models in one result."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from loader.cli.report import show
from loader.cli.tables import show_ready
from loader.errors import ConfigError
from loader.fetch.progress import LogProgress, Progress
from loader.scaffold.selection import Selection
from loader.types import ReadyModel

if TYPE_CHECKING:
    from loader.config.settings import Settings
    from loader.timeline import Timeline


def check_words(selection: Selection, address: str) -> None:
    """Raise ConfigError where ``--ray`` took CONFIG for its ADDRESS."""
    if selection.target is None and Selection(address).config_file is not None:
        raise ConfigError(
            "--ray takes the word behind it for the cluster's address",
            where="--ray",
            got=address,
            next_step=f"podloader prepare {address} --ray",
        )


def prepare_nodes(settings: Settings, address: str, timeline: Timeline) -> Mapping[str, ReadyModel]:
    """Return the model of each node; show them all."""
    from loader.nodes.together import prepare_on_ray

    with _progress() as progress_of:
        models = prepare_on_ray(settings, address, progress_of=progress_of, timeline=timeline)
    for node, ready in models.items():
        show(f"node       {node}")
        show_ready(ready)
    return models


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], Progress]]:
    """Give what gives each node's progress: a row where standard error is a terminal, or lines."""
    if not (sys.stderr.isatty() and logging.getLogger("podloader").isEnabledFor(logging.INFO)):
        yield lambda node: LogProgress(before=f"{node}: " if node else "")
        return
    from loader.cli.node_bars import NodeBars

    with NodeBars() as bars:
        yield bars.row
