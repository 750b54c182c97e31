"""Log lines of this package: without secrets, on a handler and at a level of their own.

Others who share the process set the root logger to what they like.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from loader.errors import one_line, printable, redact


class _Shown(logging.Formatter):
    """Lines without signatures, whoever logged them, one for a record of ours without an error."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            record = logging.makeLogRecord(vars(record))
            record.args = tuple(one_line(a) if isinstance(a, str) else a for a in record.args or ())
        return shown(super().format(record))


class _Json(_Shown):
    """One JSON object a line: ``time`` (RFC 3339, UTC), ``level``, ``message``, ``trace_id``.

    The last, where there is one, is that of the start's OpenTelemetry spans.
    """

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname, "message": super().format(record)}
        trace = {"trace_id": _chosen["trace_id"]} if _chosen.get("trace_id") else {}
        return json.dumps(line | trace)


_chosen: dict[str, Any] = {}


def set_up_logging(
    *, verbose: bool = False, quiet: bool = False, as_json: bool = False, trace_id: str = ""
) -> None:
    """Send log lines to standard error; *quiet* leaves errors alone."""
    _chosen.update(verbose=verbose, quiet=quiet, as_json=as_json, trace_id=trace_id)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if as_json else _Shown("%(message)s"))
    logger = logging.getLogger("podloader")
    logger.handlers[:] = [handler]
    logger.propagate = False
    quiet_level = logging.ERROR if quiet else logging.INFO
    logger.setLevel(logging.DEBUG if verbose else quiet_level)


def name_trace(trace_id: str) -> None:
    """Let JSON lines say from now on which start they belong to."""
    _chosen["trace_id"] = trace_id


def logging_chosen() -> str:
    """Return, as JSON, the arguments that let another process log as this one does."""
    return json.dumps(_chosen)


def shown(text: str) -> str:
    """Return *text* without secrets, and without what a terminal takes for commands.

    Names come from listings, which anybody may have written.
    """
    return printable(redact(text))
