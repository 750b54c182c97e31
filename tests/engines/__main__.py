"""``python -m tests.engines [RELEASE…]``: what podloader misses in releases of vLLM, and a run.

Without a release: every proved one. The run is ``tests/serve`` and ``tests/pod``, on the release's
Python over the CPU build's compiled parts; its failures count where a bare ``LLM(...)`` answers.
"""

from __future__ import annotations

import sys

from loader.serve.vllm.releases import PROVED
from tests.engines.contract import breaks
from tests.engines.overlay import Run, run_on
from tests.engines.sources import UnavailableError, sources_of

_WHOLE = ("tests/serve", "tests/pod")


def main(releases: list[str]) -> int:
    """Print it all; return 0 where nothing breaks."""
    broken = False
    for release in releases or PROVED:
        try:
            missed = breaks(sources_of(release))
            print(f"vLLM {release}: {'lacks' if missed else 'has all that is used'}", flush=True)
            for line in missed:
                print(f"  {line}", flush=True)
            run = run_on(release, _WHOLE, quiet=False)
        except UnavailableError as error:
            print(f"vLLM {release}: {error}")
            broken = True
            continue
        print(f"vLLM {release}: {_SAID[run]}", flush=True)
        broken |= bool(missed) or run is Run.FAILED
    return int(broken)


_SAID = {
    Run.PASSED: "the tests pass",
    Run.FAILED: "tests fail, as listed above",
    Run.NO_ENGINE: "not run: a bare LLM(...) does not answer on these compiled parts either",
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
