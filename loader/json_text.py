"""JSON that others wrote: its value, or a ``ValueError``, however deep it is nested."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def parse_json(
    text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Return what *text* holds, each of its objects as *pairs* makes it.

    Raises:
        ValueError: it is no JSON, no Unicode, has integers of thousands of digits, or is nested
            deeper than Python follows.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("nested too deeply") from None
