"""Every error that podloader raises on purpose.

LoaderError                 base; ``exit_code`` is what the command line ends with
├── ConfigError        (2)  the config.yaml or a PODLOADER_* variable is wrong
├── ListingError       (3)  the artifact listing is missing, malformed or of another job
│   └── UnreachableError    its place does not answer (``retryable``)
├── ResolveError       (3)  patterns and listing do not fit together, or a name is unsafe
├── FetchError         (4)  bytes could not be brought here
│   ├── TransientError      worth asking again (``retryable``)
│   ├── DeniedError         the origin refuses access
│   ├── ExpiredError        a signed URL is no longer honoured
│   ├── ChangedError        the object changed while it was being read
│   ├── WholeFileError      a range is answered with all of a file
│   ├── UnsizedError        nothing tells how long an object is
│   ├── SumError            what came does not sum up to what is declared of it
│   ├── UnprovedError       files are not what they were when they were fetched
│   └── DiskError           no room, or the disk refused
├── CheckpointError    (5)  the files are here and cannot be used
│   ├── FormatError         a file is not what its format says
│   ├── UnsupportedError    a kind that podloader knows and does not serve
│   └── AdapterError        an adapter does not fit its base
├── EngineError        (6)  the engine did not start or stopped
└── NodeError          (7)  a node of several is gone, or there are too few
RequestError                a caller's request is wrong; the engine stays well
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

_MOST_TEXT = 20_000  # characters of a field; what is foreign may be of any length
_MOST_PROBLEMS = 1000
# A URL need not be a right one to hold secrets: it may have blanks, newlines or quotes in it, and
# what separates its parts may be encoded, even twice.
_QUERY = re.compile(
    r"(https?://[^?\n]*)\?\S*?(?:\s+\S*[=&%]\S*?|(?<=[=&])\s+\S+?)*(?=[)'\".,;:]*(?:\s|$))",
    re.IGNORECASE,
)
_SIGNED = re.compile(
    r"((?<![\w.-])[\w.-]*(?:signature|sig|credential|token|access(?:key)?id|key-pair-id|policy)"
    r"(?:=|%(?:25)*3d))[^\s&]+",
    re.IGNORECASE,
)
_USERINFO = re.compile(
    r"((?<!\w)\w+://)(?:[^\s/?#]+"
    r"|[^\s/:\[]*:(?!\d*(?:[/?#\s]|$))[^@\n]*(?:@[^\s@/]*)*?"  # a password of any letters
    r"|[^\s/?#:]+ [^/?#@\n]*)@"
)


def redact(text: str) -> str:
    """Return *text* with the query and user information of every URL taken out.

    So are the values of signatures and tokens, in whatever they are the parameters of.
    """
    if "@" in text:
        text = _USERINFO.sub(r"\1", text)
    if "?" in text:
        text = _QUERY.sub(r"\1?…", text)
    return _SIGNED.sub(r"\1…", text) if "=" in text or "%" in text else text


def redact_url(url: str) -> str:
    """Return *url*, all of which is one, without all that follows its path."""
    url = _USERINFO.sub(r"\1", url) if "@" in url else url
    return redact(url.partition("?")[0] + "?…" if "://" in url and "?" in url else url)


def printable(text: str) -> str:
    """Return *text*, whose letters, tabs and newlines are all that it shows, the rest as escapes.

    The rest is what a terminal or a collector of logs takes for a command, the end of a line or
    another order of the letters, and what is no letter at all.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return *text* as ``printable`` does, its newlines as escapes, too: nobody forges a line."""
    return printable(text).replace("\n", "\\n")


def _field(text: str) -> str:
    return one_line(redact(text[:_MOST_TEXT]))


class LoaderError(Exception):
    """What went wrong, where, what was expected, what was got, and what to do next."""

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        expected: str = "",
        got: str = "",
        next_step: str = "",
        problems: Sequence[str] = (),
    ) -> None:
        self.what = _field(what)
        self.where = one_line(redact_url(where[:_MOST_TEXT]))
        self.expected = _field(expected)
        self.got = _field(got)
        self.next_step = _field(next_step)
        more = len(problems) - _MOST_PROBLEMS
        self.problems = tuple(_field(p) for p in problems[:_MOST_PROBLEMS])
        if more > 0:
            self.problems += (f"and {more} more",)
        super().__init__(self.what)

    def __str__(self) -> str:
        lines = [self.what]
        named = (("where", self.where), ("expected", self.expected), ("got", self.got))
        lines += [f"  {name}: {value}" for name, value in named if value]
        lines += [f"  - {problem}" for problem in self.problems]
        if self.next_step:
            lines.append(f"  next: {self.next_step}")
        return "\n".join(lines)

    @property
    def line(self) -> str:
        """What went wrong in one line, for an answer to a request."""
        named = (("where", self.where), ("expected", self.expected), ("got", self.got))
        details = (f"{name}: {value}" for name, value in named if value)
        return "; ".join([self.what, *details, *self.problems])

    def to_json(self) -> dict[str, object]:
        """Return the fields as a JSON-ready object."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "got": self.got,
            "problems": list(self.problems),
            "next_step": self.next_step,
        }


class ConfigError(LoaderError):
    """The config.yaml or a ``PODLOADER_*`` variable is wrong."""

    exit_code = 2


class ListingError(LoaderError):
    """The artifact listing is missing, malformed or of another job."""

    exit_code = 3


class UnreachableError(ListingError):
    """The place of the listing does not answer."""

    retryable = True


class ResolveError(LoaderError):
    """Patterns and listing do not fit together, or a name is unsafe."""

    exit_code = 3


class FetchError(LoaderError):
    """Bytes could not be brought here."""

    exit_code = 4


class TransientError(FetchError):
    """A failure that asking again may cure, not before ``retry_after_s`` where it is given.

    ``busy``: the origin asks for fewer requests. ``hasty``: it was given up on sooner than counts
    as a failure; the next try has more patience.
    """

    retryable = True
    retry_after_s: float | None = None
    busy = False
    hasty = False


class DeniedError(FetchError):
    """The origin refuses access."""


class SumError(FetchError):
    """What came does not sum up to what is declared of it."""


class ExpiredError(FetchError):
    """A signed URL is no longer honoured."""


class ChangedError(FetchError):
    """The object changed while it was being read."""


class DiskError(FetchError):
    """No room, or the disk refused."""


class CheckpointError(LoaderError):
    """The files are here and cannot be used."""

    exit_code = 5


class FormatError(CheckpointError):
    """A file is not what its format says."""


class UnsupportedError(CheckpointError):
    """A kind that podloader knows and does not serve."""


class AdapterError(CheckpointError):
    """An adapter does not fit its base."""


class EngineError(LoaderError):
    """The engine did not start or stopped."""

    exit_code = 6


class NodeError(LoaderError):
    """A node of several is gone, or there are too few."""

    exit_code = 7


class RequestError(LoaderError):
    """A caller's request is wrong; the engine stays well."""

    def __init__(self, what: str, *, status: int = 400, **fields: str) -> None:
        super().__init__(what, **fields)
        self.status = status


def on_node(error: LoaderError, node: str) -> LoaderError:
    """Return *error*, which is not changed otherwise, with *node* in front of what went wrong."""
    error.what = f"{one_line(node)}: {error.what}"
    error.args = (error.what,)
    return error


def error_from_json(document: Mapping[str, Any]) -> LoaderError:
    """Return the error whose ``to_json`` another process sent."""
    kind: Any = globals().get(str(document.get("error")))
    if not (isinstance(kind, type) and issubclass(kind, LoaderError)):
        kind = EngineError
    fields = ("where", "expected", "got", "next_step")
    problems = document.get("problems")
    error: LoaderError = kind(
        str(document.get("what", "the engine did not start")),
        problems=[str(problem) for problem in problems] if isinstance(problems, list) else (),
        **{name: str(document.get(name, "")) for name in fields},
    )
    return error
