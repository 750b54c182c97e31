"""What a command says: people's lines to standard error, one JSON document to standard output."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

from loader.errors import LoaderError, redact
from loader.log_lines import shown

VERSION = 1  # of every JSON document; a field may be added without a new number
_UNEXPECTED = 1


def say(line: str = "") -> None:
    """Write a line for a person."""
    sys.stderr.write(shown(line) + "\n")
    sys.stderr.flush()


def write_json(document: dict[str, object]) -> None:
    """Write the one document of a command."""
    sys.stdout.write(json.dumps({"version": VERSION, **document}) + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def errors_shown(as_json: bool) -> Iterator[None]:
    """Turn what goes wrong in the block into lines and the documented exit code."""
    from loader.pod.signals import Signals, StopSignal

    signals = Signals()
    try:
        yield
    except LoaderError as error:
        say(f"error: {error}")
        if as_json:
            write_json({"error": error.to_json()})
        raise SystemExit(error.exit_code) from None
    except StopSignal as stop:
        say(f"ended by {stop}; what has been fetched is kept")
        raise SystemExit(stop.exit_code) from None
    except BrokenPipeError:
        raise
    except EOFError:
        say("error: no answer")
        raise SystemExit(_UNEXPECTED) from None
    except Exception as error:
        _unexpected(error, as_json)
    finally:
        signals.restore()


def _unexpected(error: Exception, as_json: bool) -> NoReturn:
    say("".join(traceback.format_exception(error)).rstrip())
    say("error: this is a fault of podloader or of a library; the lines above say where")
    if as_json:
        write_json({"error": {"error": type(error).__name__, "what": redact(str(error))}})
    raise SystemExit(_UNEXPECTED) from None
