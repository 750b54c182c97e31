"""``python -m loader`` is the command ``podloader``."""

import os
import sys

# `-m` puts the working folder first, whose files are no modules of ours; podloader may lie in it.
if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):  # noqa: PTH120
    del sys.path[0]

from loader.cli import main

main()
