"""What transformers knows of a model, learned in a process of its own beside other work.

Importing transformers takes seconds, and in a pod another thread may be importing vLLM meanwhile,
which has to be waited for: modules that import each other in circles come in one thread at a time.
The process imports them at once and waits until it is asked.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loader.errors import UnsupportedError
from loader.import_lock import importing
from loader.json_text import parse_json
from loader.parent import end_with_parent
from loader.units import show_seconds
from loader.weights.architecture import is_at_hand
from loader.weights.formats.expected import ModelNames, read_model_names
from loader.weights.gaps import Gaps, Shapes, compare_layers, find_gaps

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

    def learn(folder: Path) -> ModelNames:
        told = _ask(process, folder / "config.json", {"folder": str(folder.absolute())})
        return ModelNames.from_json(told) if told else read_model_names(folder)

    with _started() as process:
        yield learn


class GapLearner:
    """Does as ``find_gaps``; here where transformers is imported here, or just now is. Close it."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Let another process import transformers, if this one has not by now."""
        if self._process is None and not is_at_hand():
            self._process = self._stack.enter_context(_started())

    def learn(
        self, place: Path, config: Mapping[str, object], shapes: Shapes, *, text_only: bool
    ) -> Gaps:
        """Return what a checkpoint lacks of the model in *config*, which is read from *place*.

        Raises:
            UnsupportedError: the class takes too long to be made.
        """
        with importing:  # whoever imports it in this process is nearly done
            self.start()
            process, self._process = self._process, None  # which answers once
        if process is not None:
            question = {"config": config, "shapes": shapes, "text_only": text_only}
            if told := _ask(process, place, question):
                return Gaps.from_json(told)
        try:
            return find_gaps(config, shapes, text_only=text_only)
        except ImportError:
            return compare_layers(shapes)

    def close(self) -> None:
        """End the process if there is one."""
        self._stack.close()


@contextlib.contextmanager
def _started() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-P", "-c", _MAIN, json.dumps(sys.path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def _ask(
    process: subprocess.Popen[bytes], config: Path, question: Mapping[str, object]
) -> Mapping[str, Any] | None:
    """Return what the process says, None where it could not learn it."""
    try:
        answered, _ = process.communicate(json.dumps(question).encode(), _LIMIT_S)
    except subprocess.TimeoutExpired:
        raise UnsupportedError(
            "a config.json of which transformers makes no model in time",
            where=str(config),
            expected=f"an answer within {show_seconds(_LIMIT_S)}",
            next_step="save the model with save_pretrained in the training job",
        ) from None
    except OSError:
        return None
    try:
        told = parse_json(answered)
    except ValueError:
        return None
    return told if isinstance(told, dict) else None


def answer() -> None:
    """Be that process: read what is asked from standard input, answer to standard output."""
    end_with_parent(signal.SIGKILL)  # nothing here is worth a word, and an import heeds no other
    asked = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())  # no library asks for a "y" there
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # for what libraries may have to say
    gc.disable()  # of what imports make next to nothing is garbage
    for name in _LEFT_OUT:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in ("torch", "transformers.modeling_utils", "transformers.models.auto.modeling_auto"):
        importlib.import_module(name)
    question = parse_json(asked.read())
    about = "folder" in question
    told = read_model_names(Path(question["folder"])) if about else find_gaps(**question)
    with os.fdopen(answers, "w") as file:
        json.dump(told.to_json(), file)
    os._exit(0)  # the interpreter takes a while to take all of it down
