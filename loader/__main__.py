"""``python -m loader`` is the command ``podloader``, which takes no file beside it for a module."""

import os
import sys

# `-m` has put the working folder first. It may be where podloader itself lies.
if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):  # noqa: PTH120
    del sys.path[0]

from loader.cli import main

main()
