"""What the fork server imports before the engine's processes are forked from it."""

from __future__ import annotations

import contextlib

from loader.serve.vllm.openai_server import import_engine

with contextlib.suppress(Exception):  # the engine's own start will tell
    import_engine()
