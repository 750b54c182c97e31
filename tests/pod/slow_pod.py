"""``podloader serve`` over a folder that fills up as a test says, in place of a download.

``python -m tests.pod.slow_pod SOURCE SCENARIO serve CONFIG … -- …``; the scenario is JSON::

    order       as for ``SlowFolder``
    pause_s     after every three tensors
    stall_s     before the last one, from when an engine's worker waits for it
    fails       "midway", or "proof" for a sum that is wrong when all is here
    another     what is returned has another name than what was announced
    breaks      the feed when half of the tensors are here: "close", or "cut", which it is not told
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from loader import boot
from loader.arriving.feed import Feed
from loader.cli.commands import main
from loader.errors import FetchError
from loader.timeline import Timeline
from loader.types import ReadyModel
from tests.filling import SlowFolder


def _fill(filling: SlowFolder, scenario: dict[str, Any]) -> None:
    names = filling.order(scenario.get("order", ""))
    for start in range(0, len(names) - 1, 3):
        filling.put(names[start : min(start + 3, len(names) - 1)])
        time.sleep(scenario.get("pause_s", 0.05))
        if start >= len(names) / 2:
            if scenario.get("fails") == "midway":
                error = FetchError("the download failed midway")
                filling.end(error)
                raise error
            if scenario.get("breaks"):
                while not any(feed.is_followed for feed in _feeds):
                    time.sleep(0.1)
                for feed in _feeds:
                    _break(feed, scenario["breaks"])
    if scenario.get("stall_s"):
        while not any(feed.is_followed for feed in _feeds):
            time.sleep(0.1)
        time.sleep(scenario["stall_s"])
    filling.put(names[-1:])
    filling.end()


_feeds: list[Feed] = []


def _break(feed: Feed, how: str) -> None:
    if how == "close":
        feed.close()
    for one in feed._followers if how == "cut" else ():
        with contextlib.suppress(OSError):  # it is cut already
            one.end.shutdown(socket.SHUT_RDWR)


def _run(source: Path, scenario: dict[str, Any], arguments: list[str]) -> None:
    class KnownFeed(Feed):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            _feeds.append(self)

    from loader.serve.vllm import streaming

    streaming.Feed = KnownFeed  # type: ignore

    def prepare(
        settings: Any, progress: Any, timeline: Timeline, ask: Any = None, announce: Any = None
    ) -> ReadyModel:
        folder = Path(tempfile.mkdtemp(dir=settings.training.download_folder.parent))
        filling = SlowFolder(source, folder / "model")
        ready = ReadyModel(source, (), None, source, {})
        if announce:
            announce(filling, ready)
        with timeline.stage("download"):
            _fill(filling, scenario)
        if scenario.get("fails") == "proof":
            time.sleep(scenario.get("proof_s", 0))
            raise FetchError("the sum of the last file is wrong")
        return replace(ready, provenance={"name": "b"}) if scenario.get("another") else ready

    boot.prepare = prepare  # type: ignore[assignment]
    sys.argv = ["podloader", *arguments]
    main()


if __name__ == "__main__":
    _run(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
