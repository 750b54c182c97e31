"""Children of a process that was killed."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

_PARENT = """
import multiprocessing, sys, time
from loader.serve.vllm.orphans import OrphanGuard

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    kept, other = (
        context.Process(target=time.sleep, args=(60,), name=name, daemon=True)
        for name in ("EngineCore_DP0", "Other")
    )
    kept.start(), other.start()
    guard = OrphanGuard("EngineCore")
    if sys.argv[1] == "close":
        guard.close()
    print(kept.pid, other.pid, flush=True)
    time.sleep(60)
"""


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def killed_parent_s_children(mode: str) -> list[bool]:
    """Return which of the guarded and the other child still run after a while."""
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, mode], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    ends = time.monotonic() + 5
    while time.monotonic() < ends and runs(pids[0]):
        time.sleep(0.05)
    alive = [runs(pid) for pid in pids]
    for pid in pids:
        if psutil.pid_exists(pid):
            psutil.Process(pid).kill()
    return alive


def test_only_guarded_children_end_with_their_parent() -> None:
    assert killed_parent_s_children("guard") == [False, True]


def test_a_closed_guard_ends_nothing() -> None:
    assert killed_parent_s_children("close") == [True, True]
