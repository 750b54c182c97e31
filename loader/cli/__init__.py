"""The command ``podloader``: arguments, progress, logging and exit codes; decides nothing else."""

from __future__ import annotations

import sys

__all__ = ["main"]

INTERRUPTED = 128 + 2  # as a shell tells of a process that SIGINT ended


def main() -> None:
    """Run the command line. An interrupt while it is imported has nothing to tell of."""
    try:
        from loader.cli.commands import main as run
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    run()
