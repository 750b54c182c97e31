"""``python -m loader`` is the command ``podloader``."""

from loader.cli import main

main()
