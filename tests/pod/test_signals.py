"""Signals while a pod starts, and orphans of a PID 1."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from loader.pod.signals import Signals, StopSignal
from tests.pod.pods import needs_namespaces


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_they_are_given_to_the_receiver_and_nothing_is_raised(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    heard: list[int] = []
    signals = Signals(heard.append)
    signal.raise_signal(number)
    signals.restore()
    assert heard == [number]
    assert signal.getsignal(number) is before
    assert StopSignal(number).exit_code == 128 + number


def test_without_a_receiver_the_main_thread_is_interrupted() -> None:
    signals = Signals()
    with pytest.raises(StopSignal):
        signal.raise_signal(signal.SIGTERM)
    signals.restore()


def test_orphans_of_pid_1_do_not_stay_as_zombies() -> None:
    needs_namespaces()
    script = """
import os, signal, subprocess, time
from loader.pod.signals import reap_orphans
own = subprocess.Popen(["sleep", "1"])
signal.signal(signal.SIGCHLD, lambda *_: reap_orphans(own.pid))
subprocess.Popen(["sh", "-c", "(sleep 0.1; exit 3) & exit 0"]).wait()
time.sleep(0.5)
states = [open(f"/proc/{p}/stat").read().split()[2] for p in os.listdir("/proc") if p.isdigit()]
assert "Z" not in states, states
assert own.wait() == 0
"""
    command = ["unshare", "--fork", "--pid", "--mount-proc", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=os.environ)
    assert done.returncode == 0, done.stderr
