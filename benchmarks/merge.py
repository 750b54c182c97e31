"""Merging a LoRA into a model of 1B parameters: podloader, PEFT, ``cp``, and mergekit if given.

    python -m benchmarks.merge [--folder DIR] [--layers 22] [--mergekit PYTHON] [--runs 5]
                               [--slow-runs 2]

Give a ``--folder`` in memory (/dev/shm) to leave a slow disk out of it.

The model (Llama, bf16, random weights) and the adapter (rank 16, all linear layers) are made in
place. Every contestant runs as a process of its own, after one that reads the base into the page
cache; the time is the whole process's but for imports, which are given apart. The peak is resident
memory, mapped files included, above what the interpreter takes once everything is imported.
mergekit is timed with its imports; of it, resident memory is watched from outside, imports
included. ``cp`` is the floor: it copies the base's files and does nothing else.

At the end the outputs are loaded by transformers: how many tensors differ from PEFT's in any bit,
and whether greedy tokens are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.models import VOCABULARY, make_base_and_adapter

_CLOCK = """
import json, sys, time

def resident(key):
    # Not ru_maxrss: that is inherited from the process that started this one.
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) * 1024

began = time.perf_counter()
{imports}
ready, before = time.perf_counter(), resident("VmRSS")
{work}
done = time.perf_counter()
peak = resident("VmHWM") - before
print(json.dumps({{"imports_s": ready - began, "work_s": done - ready, "peak_bytes": peak}}))
"""
_CONTESTANTS = {
    "podloader": (
        "from pathlib import Path; from loader.adapters.merge import WeightedAdapter, merge",
        "merge(Path({base!r}), [WeightedAdapter(Path({adapter!r}))], Path({output!r}))",
    ),
    "podloader, exact=peft": (
        "from pathlib import Path; from loader.adapters.merge import WeightedAdapter, merge",
        "merge(Path({base!r}), [WeightedAdapter(Path({adapter!r}))], Path({output!r}), "
        "exact='peft')",
    ),
    "PEFT": (
        "from peft import PeftModel; from transformers import AutoModelForCausalLM, AutoTokenizer",
        "model = AutoModelForCausalLM.from_pretrained({base!r}, dtype='auto')\n"
        "model = PeftModel.from_pretrained(model, {adapter!r}).merge_and_unload()\n"
        "model.save_pretrained({output!r})",
    ),
    "cp": ("import subprocess", "subprocess.run(['cp', '-r', {base!r}, {output!r}], check=True)"),
}
_MERGEKIT = {"merge_method": "linear", "dtype": "bfloat16"}
_SLOW = ("PEFT", "mergekit")
_COMPARED = ("podloader", "podloader, exact=peft", "PEFT")
_PROMPTS = 8
_TOKENS = 32


def measure(python: str, name: str, base: Path, adapter: Path, output: Path) -> dict[str, float]:
    """Return the times and the peak memory of one contestant, run once."""
    for path in sorted(base.iterdir()):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    imports, work = _CONTESTANTS[name]
    names = {"base": str(base), "adapter": str(adapter), "output": str(output)}
    script = _CLOCK.format(imports=imports, work=work.format(**names))
    root = str(Path(__file__).resolve().parents[1])
    result = subprocess.run(
        [python, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"},
    )
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def compare_weights(one: Path, other: Path) -> int:
    """Return how many tensors of two folders differ in any bit."""
    from loader.weights.readers import open_weights

    ours, theirs = open_weights(one), open_weights(other)
    names = {*ours.tensors, *theirs.tensors}
    return sum(1 for name in names if ours.read_raw(name) != theirs.read_raw(name))


def greedy_tokens(folder: Path) -> list[list[int]]:
    """Return what the model of *folder* says after a few prompts, as transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    prompts = torch.randint(
        0, VOCABULARY, (_PROMPTS, 16), generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=_TOKENS,
        )
    tokens: list[list[int]] = out[:, 16:].tolist()
    return tokens


def run_mergekit(python: str, base: Path, adapter: Path, output: Path) -> dict[str, float]:
    """Return the time that mergekit takes for the same, as a process of its own."""
    config = output.parent / "mergekit.yaml"
    model = {"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}}
    config.write_text(json.dumps({**_MERGEKIT, "models": [model]}))
    cache = output.parent / "mergekit-cache"
    program = Path(python).parent / "mergekit-yaml"
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(program), str(config), str(output), "--lora-merge-cache", str(cache)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    status = Path(f"/proc/{process.pid}/status")
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            peak = max(peak, int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024)
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(f"mergekit failed: {process.stderr.read()[-2000:]}")
    shutil.rmtree(cache, ignore_errors=True)
    return {"imports_s": 0.0, "work_s": seconds, "peak_bytes": peak}


def main() -> None:
    """Print one line for each contestant: the best of the runs, and how it compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "merge-bench")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--slow-runs", type=int, default=2, help=f"of {' and '.join(_SLOW)}")
    parser.add_argument("--mergekit", help="a Python that has mergekit installed")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    base, adapter = make_base_and_adapter(options.folder, options.layers)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    print(f"base: {size / 1e9:.2f} GB, {len(list(base.glob('*.safetensors')))} files")
    names = [*_CONTESTANTS, *(["mergekit"] if options.mergekit else [])]
    best: dict[str, dict[str, float]] = {}
    for number in range(options.runs):
        for name in names:  # in turns, so that a slow minute of the machine meets all alike
            if name in _SLOW and number >= options.slow_runs:
                continue
            output = _output(options.folder, name)
            shutil.rmtree(output, ignore_errors=True)
            if name == "mergekit":
                found = run_mergekit(options.mergekit, base, adapter, output)
            else:
                found = measure(sys.executable, name, base, adapter, output)
            if name not in _COMPARED:
                shutil.rmtree(output)
            if name not in best or found["work_s"] < best[name]["work_s"]:
                best[name] = found
    for name, found in best.items():
        print(
            f"{name:26} {found['work_s']:6.2f} s  (imports {found['imports_s']:5.2f} s)  "
            f"peak {found['peak_bytes'] / 1e6:6.0f} MB = {found['peak_bytes'] / size:6.1%}  "
            f"{found['work_s'] / best['cp']['work_s']:5.2f} x cp  "
            f"PEFT / this {best['PEFT']['work_s'] / found['work_s']:5.1f}"
        )
    outputs = {name: _output(options.folder, name) for name in _COMPARED}
    said = {name: greedy_tokens(folder) for name, folder in outputs.items()}
    for name in _COMPARED[:2]:
        differing = compare_weights(outputs[name], outputs["PEFT"])
        alike = sum(ours == theirs for ours, theirs in zip(said[name], said["PEFT"], strict=True))
        print(
            f"{name}: {differing} tensors differ from PEFT's in any bit, greedy tokens are the "
            f"same for {alike} of {_PROMPTS} prompts"
        )


def _output(folder: Path, name: str) -> Path:
    return folder / f"out-{name.replace(' ', '')}"


if __name__ == "__main__":
    main()
