"""What a command says: its result on standard output, all else on standard error.

With ``--json`` the result is one JSON document; the lines for people then go to standard error.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn, TextIO

from loader.errors import DiskError, LoaderError, one_line, redact
from loader.log_lines import shown

VERSION = 1  # of every JSON document; a field may be added without a new number
_UNEXPECTED = 1
_streams: dict[str, TextIO | None] = {"note": sys.stderr, "result": sys.stdout}
_log = logging.getLogger("podloader")
_logged = False


def set_up_report(*, as_json: bool, quiet: bool, logged: bool = False) -> None:
    """Choose where lines go: *quiet* leaves errors, and the document where there is one.

    *logged*: what is said on the way to the result, and errors, are log lines.
    """
    global _logged
    _logged = logged
    lines = None if quiet else sys.stderr
    _streams.update(note=lines, result=lines if as_json else None if quiet else sys.stdout)


def say(line: str = "") -> None:
    """Write a line on the way to the result."""
    if _logged:
        _log.info("%s", line)
    else:
        _write(_streams["note"], one_line(line))


def show(line: str = "") -> None:
    """Write a line of the result, for a person."""
    _write(_streams["result"], one_line(line))


def say_error(line: str) -> None:
    """Write what went wrong."""
    if _logged:
        _log.error(line)
    else:
        _write(sys.stderr, line)


def _write(stream: TextIO | None, line: str) -> None:
    if stream is not None:
        stream.write(shown(line) + "\n")
        stream.flush()


def write_json(document: dict[str, object]) -> None:
    """Write the one document of a command."""
    sys.stdout.write(json.dumps({"version": VERSION, **document}) + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def errors_shown(as_json: bool, kept: str = "what has been fetched is kept") -> Iterator[None]:
    """Turn what goes wrong in the block into lines and the documented exit code.

    *kept*: what is left where a signal ends it.
    """
    from loader.pod.signals import Signals, StopSignal

    signals = Signals()
    try:
        yield
    except LoaderError as error:
        _end(error, as_json)
    except StopSignal as stop:
        say(f"ended by {stop}; {kept}")
        if as_json:
            write_json({"error": {"error": "Interrupted", "what": f"ended by {stop}"}})
        raise SystemExit(stop.exit_code) from None
    except BrokenPipeError:
        raise
    except EOFError:
        say_error(f"error: no answer; {kept}")
        raise SystemExit(_UNEXPECTED) from None
    except Exception as error:
        if not isinstance(error, OSError) or error.filename is None:
            _unexpected(error, as_json)
        _log.debug("the system refused a path", exc_info=error)
        _end(_of_path(error), as_json)
    finally:
        signals.restore()


def _end(error: LoaderError, as_json: bool) -> NoReturn:
    say_error(f"error: {error}")
    if as_json:
        write_json({"error": error.to_json()})
    raise SystemExit(error.exit_code) from None


def _of_path(error: OSError) -> LoaderError:
    """Return our error for what the system has against a path, which a person gave or laid."""
    return DiskError(
        "a path that cannot be used",
        where=os.fsdecode(error.filename) if not isinstance(error.filename, int) else "",
        got=error.strerror or type(error).__name__,
        next_step="give another path, or what the system asks for: room, a right, a shorter name",
    )


def _unexpected(error: Exception, as_json: bool) -> NoReturn:
    say_error("".join(traceback.format_exception(error)).rstrip())
    say_error("error: this is a fault of podloader or of a library; the lines above say where")
    if as_json:
        write_json({"error": {"error": type(error).__name__, "what": redact(str(error))}})
    raise SystemExit(_UNEXPECTED) from None
