"""The command ``podloader``: arguments, progress, logging and exit codes; decides nothing else."""

from __future__ import annotations

from loader.cli.commands import main

__all__ = ["main"]
