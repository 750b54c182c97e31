"""vLLM's cache of compiled kernels: a pod that cannot write it is told so before it pays for it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

_log = logging.getLogger("podloader")


def unwritable_cache() -> str:
    """Return why vLLM's cache is of no use, and what helps; empty where it is filled or can be.

    An image may bring a full one that is read-only.
    """
    from loader.serve.vllm.private import VLLM_CACHE_ROOT

    root = Path(VLLM_CACHE_ROOT)
    if not root.is_absolute():  # no HOME and no entry in passwd: "~" stays, a folder's name
        return (
            f"vLLM keeps what it compiles in {root.absolute()}, since this user has no home; "
            "set VLLM_CACHE_ROOT to a folder that is kept"
        )
    try:
        if any(root.iterdir()):
            return ""
    except OSError:
        pass  # not there, or not to be read
    there = next(path for path in (root, *root.parents) if path.exists())
    if os.access(there, os.W_OK | os.X_OK):
        return ""
    return (
        f"vLLM's cache, {root}, is empty and user {os.getuid()} cannot write it: every start "
        "compiles anew, or fails; mount a volume there that this user may write, or set "
        "VLLM_CACHE_ROOT to another"
    )


def warn_unwritable_cache() -> None:
    """Log a warning where vLLM can keep nothing of what it compiles."""
    if why := unwritable_cache():
        _log.warning("%s", why)
