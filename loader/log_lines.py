"""Log lines of this package: without secrets, on a handler and at a level of their own.

Others who share the process set the root logger to what they like.
"""

from __future__ import annotations

import logging
import re
import sys

from loader.errors import redact

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _Shown(logging.Formatter):
    """Lines without signatures, whoever logged them."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def set_up_logging(*, verbose: bool = False) -> None:
    """Send log lines to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Shown("%(message)s"))
    logger = logging.getLogger("podloader")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)


def shown(text: str) -> str:
    """Return *text* without secrets, and without what a terminal takes for commands.

    Names come from listings, which anybody may have written.
    """
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], redact(text))
