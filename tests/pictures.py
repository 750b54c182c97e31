"""The pictures in docs/, of a real start: ``python -m tests.pictures`` makes them anew.

A tiny model and two adapters, a slow origin so that there is something to see, and Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from tests import origin as faults
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import serving
from tests.pod.pods import RunningPod, start_pod, write_config
from tests.readme import ROOT

DOCS = ROOT / "docs"
_SIZE = (1000, 1800)  # pixels; what is empty below is cut off


def make(folder: Path, chromium: str) -> None:
    """Write boot.svg and two screenshots of ``/status``."""
    with serving(folder / "origin") as origin:
        base = tiny_llama(origin.folder("base") / "base")
        for seed, job in enumerate(("joba", "jobb"), 1):
            train_or_draw_lora(base, origin.folder(job) / "checkpoint-1", seed=seed, spread=0.3)
        config = write_config(origin, folder / "pod", "joba", "jobb")
        origin.fail("base/model.safetensors", *[faults.slow(0.15)] * 99)
        variables = {"VLLM_CPU_KVCACHE_SPACE": "1"}
        pod = start_pod(config, as_pid_1=False, environment=variables)
        try:
            pod.wait_for(lambda body: body["bytes"]["done"] > 500_000)
            photograph(chromium, pod, folder, "status-starting.png")
            pod.wait_ready()
            photograph(chromium, pod, folder, "status-ready.png")
        finally:
            pod.close()
        shutil.copy(folder / "pod" / "boot.svg", DOCS)


def photograph(chromium: str, pod: RunningPod, folder: Path, name: str) -> None:
    """Write what a browser shows of ``/status``."""
    taken = folder / name
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += [f"--window-size={_SIZE[0]},{_SIZE[1]}", f"--screenshot={taken}"]
    # The page asks for its moving part every second; a picture needs none.
    subprocess.run(
        [chromium, *flags, f"{pod.url}/status"], check=True, capture_output=True, timeout=120
    )
    picture = Image.open(taken).convert("RGB")
    background = Image.new("RGB", picture.size, picture.getpixel((2, picture.height - 2)))
    box = ImageChops.difference(picture, background).getbbox()
    assert box is not None
    cut = picture.crop((0, 0, picture.width, min(box[3] + 16, picture.height)))
    cut.quantize(64).save(DOCS / name, optimize=True)


if __name__ == "__main__":
    found = shutil.which("chromium")
    if found is None:
        raise SystemExit("the pictures need chromium")
    place = Path(tempfile.gettempdir(), "pictures")  # it can be seen in them
    place.mkdir()
    try:
        make(place, found)
    finally:
        shutil.rmtree(place)
