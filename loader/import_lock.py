"""One thread at a time imports large packages.

The modules of torch, transformers and vLLM import each other in circles. Where two threads enter a
circle from two sides, Python ends the deadlock by giving one of them a module that is not whole yet
(``importlib._bootstrap._DeadlockError``), and its import fails.
"""

from __future__ import annotations

import threading

importing = threading.RLock()
"""Held by whoever imports a large package while another thread may, too."""
