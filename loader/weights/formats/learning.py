"""A model's tensor names, learned in a process of its own while this one does other work.

Importing transformers takes seconds, and in a pod another thread may be importing vLLM meanwhile,
which has to be waited for: modules that import each other in circles come in one thread at a time.
The process imports them at once and waits until it is asked for a folder.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from loader.errors import UnsupportedError
from loader.json_text import parse_json
from loader.units import show_seconds
from loader.weights.architecture import is_at_hand
from loader.weights.formats.expected import ModelNames, read_model_names

# Large packages that transformers imports where it finds them, and one that fetches code. A few
# models of its cannot be built without, which then fails there, and is done here.
_LEFT_OUT = ("accelerate", "kernels", "scipy", "sklearn")
_LIMIT_S = 600.0  # seconds are usual, where the machine is not busy
_MAIN = (
    "import json, sys\n"
    "sys.path[:] = json.loads(sys.argv[1])\n"
    "from loader.weights.formats.learning import answer\n"
    "answer()"
)


@contextlib.contextmanager
def learning_names() -> Iterator[Callable[[Path], ModelNames]]:
    """Give what does as ``read_model_names``, sooner. The block's end ends the process, too."""
    if is_at_hand():
        yield read_model_names
        return
    command = [sys.executable, "-P", "-c", _MAIN, json.dumps(sys.path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        try:
            yield lambda folder: _ask(process, folder) or read_model_names(folder)
        finally:
            process.kill()


def _ask(process: subprocess.Popen[bytes], folder: Path) -> ModelNames | None:
    """Return what the process says, None where it could not learn the names."""
    try:
        answered, _ = process.communicate(os.fsencode(folder.absolute()), _LIMIT_S)
    except subprocess.TimeoutExpired:
        raise UnsupportedError(
            "a config.json of which transformers makes no model in time",
            where=str(folder / "config.json"),
            expected=f"an answer within {show_seconds(_LIMIT_S)}",
            next_step="save the model with save_pretrained in the training job",
        ) from None
    except OSError:
        return None
    try:
        return ModelNames.from_json(parse_json(answered))
    except ValueError:
        return None


def answer() -> None:
    """Be that process: read a folder from standard input, write the names to standard output."""
    asked = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())  # no library asks for a "y" there
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # for what libraries may have to say
    gc.disable()  # of what imports make next to nothing is garbage
    for name in _LEFT_OUT:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in ("torch", "transformers.modeling_utils", "transformers.models.auto.modeling_auto"):
        importlib.import_module(name)
    names = read_model_names(Path(os.fsdecode(asked.read())))
    with os.fdopen(answers, "w") as file:
        json.dump(names.to_json(), file)
    os._exit(0)  # the interpreter takes a while to take all of it down
