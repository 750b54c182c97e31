"""What vLLM's imports cost a download that runs beside them: in a thread, and in a process.

    python -m benchmarks.imports [--folder DIR] [--gib 3]

One file of zeros comes from a local server as fast as it can, into a folder in memory if
``--folder`` is one (/dev/shm). The imports begin with the download; both times are given.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from loader.demo.origin import Origin

_RUN = """
import json, subprocess, sys, threading, time
from loader import boot
from loader.config.settings import Settings
config, beside = sys.argv[1:]
settings = Settings.load(config)

def imports():
    from loader.serve.vllm.openai_server import import_engine
    import_engine()

began = time.monotonic()
if beside == "thread":
    thread = threading.Thread(target=imports)
    thread.start()
    wait = thread.join
elif beside == "process":
    command = "from loader.serve.vllm.openai_server import import_engine; import_engine()"
    process = subprocess.Popen([sys.executable, "-c", command])
    wait = process.wait
else:
    wait = lambda: None
boot.fetch_files(settings)
fetched = time.monotonic()
wait()
done = time.monotonic()
print(json.dumps({"download_s": fetched - began, "both_s": done - began}))
"""


def measure(origin: Origin, folder: Path, beside: str) -> dict[str, float]:
    """Return the seconds of the download, and until the imports were over, too."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        listing = origin.write_listing("job", Path(made) / "job.json")
        references = [{"training_job_id": "job", "paths": ["rank-0/"]}]
        config = {
            "training_checkpoints": {
                "download_folder": f"{made}/files",
                "artifact_references": references,
            },
            "model_metadata": {"podloader": {"artifacts": [str(listing)]}},
        }
        path = Path(made) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-c", _RUN, str(path), beside]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure the three ways, once to warm up the page cache and once to tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gib", type=float, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        origin = Origin(Path(made))
        folder = Path(made, "training_projects", "demo", "jobs", "job", "rank-0", "checkpoint-1")
        folder.mkdir(parents=True)
        with (folder / "weights.bin").open("wb") as file:
            file.truncate(int(given.gib * 2**30))  # a hole: zeros that need no room
        origin.start()
        measure(origin, given.folder, "process")
        for beside in ("nothing", "thread", "process"):
            found = measure(origin, given.folder, beside)
            print(
                f"beside {beside:<8}  download {found['download_s']:6.1f} s"
                f"  both {found['both_s']:6.1f} s"
            )
        origin.stop()


if __name__ == "__main__":
    main()
