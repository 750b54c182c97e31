"""An engine that does not end: what the pod makes of it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from loader import boot
from loader.config.settings import Settings
from loader.fetch.progress import Progress
from loader.pod.pod import Pod
from loader.timeline import Timeline
from loader.types import ReadyModel
from tests.pod.pods import free_port


@pytest.mark.parametrize(
    ("hung", "signals", "code"), [("drained", 1, 0), ("busy", 1, 137), ("drained", 2, 137)]
)
def test_one_that_has_drained_has_ended_well_whatever_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hung: str, signals: int, code: int
) -> None:
    """At the limit; a second signal is another matter."""
    model = ReadyModel(tmp_path, (), None, tmp_path, {})
    monkeypatch.setattr(boot, "prepare", lambda *_, **__: model)
    monkeypatch.setattr("loader.pod.engine._WORKER", "tests.pod.hung_worker")
    monkeypatch.setattr("loader.pod.pod.KILL_AFTER_S", 1.5 if signals == 1 else 60)
    monkeypatch.setenv("HUNG", hung)
    own = {"artifacts": "x.json", "drain_timeout_s": 0.1}
    settings = Settings.load(
        {
            "training_checkpoints": {
                "download_folder": str(tmp_path / "models"),
                "artifact_references": [{"training_job_id": "job", "paths": ["rank-0/"]}],
            },
            "model_metadata": {"podloader": own},
        }
    )
    arguments = ["--host", "127.0.0.1", "--port", str(free_port())]
    with Pod(settings, arguments, Timeline()) as pod:
        pod.start(None, Progress())
        for number in range(signals):
            ask = threading.Timer(0.2 + number, os.kill, (os.getpid(), signal.SIGTERM))
            ask.start()
        assert pod.serve() == code
