"""Many pods with one model: each serves the others what it has, and the origin sends one copy.

Where no peers are named, nothing of this room is imported but this.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from loader.units import show_seconds

if TYPE_CHECKING:
    from loader.config.settings import Settings
    from loader.fetch.snapshot import FetchOptions
    from loader.stores.base import Store

_log = logging.getLogger("podloader")


def beside_peers(
    settings: Settings, store: Store, root: Path, options: FetchOptions
) -> tuple[Store, FetchOptions]:
    """Return *store* and *options* for a fetch into *root*, with the settings' peers in front.

    They are served, too, from now on until ``serve_peers_on`` ends it.

    Raises:
        ConfigError: no token, a wrong address, a port that is taken.
    """
    if not settings.peers:
        return store, options
    from loader.peers.store import beside

    return beside(settings, store, root, options)


def serve_peers_on(settings: Settings, *, wait: bool = False) -> None:
    """Go on serving the settings' peers for a while, in the background.

    *wait*: until that is over, where it is said how long it is to be.
    """
    if not settings.peers:
        return
    from loader.peers.store import linger, wait_lingering

    if not wait:
        linger(settings.peers_linger_s)
    elif "peers_linger_s" in settings.origins:
        _log.info("peers are served for %s more", show_seconds(settings.peers_linger_s))
        linger(settings.peers_linger_s)
        wait_lingering()
