"""``podloader completion``: what may come next on a command line, and the scripts that ask for it.

A shell asks with ``podloader completion SHELL -- WORD…``, the last of which is not written to its
end. So a script knows nothing of the commands, and goes on fitting when podloader is updated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

_SCRIPTS: Mapping[str, str] = {
    "bash": """\
# for bash: eval "$(podloader completion bash)", in ~/.bashrc
_podloader() {
    local IFS=$'\\n'
    COMPREPLY=($(podloader completion bash -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    [[ ${COMPREPLY-} != *= ]] || compopt -o nospace
}
complete -o default -F _podloader podloader
""",
    "zsh": """\
#compdef podloader
# for zsh: eval "$(podloader completion zsh)", in ~/.zshrc behind compinit
_podloader() {
    local -a found
    found=("${(@f)$(podloader completion zsh -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then _describe podloader found; else _files; fi
}
compdef _podloader podloader
""",
    "fish": """\
# for fish: podloader completion fish | source, in ~/.config/fish/config.fish
function __podloader
    set -l before (commandline -opc)
    podloader completion fish -- $before[2..] (commandline -ct) 2>/dev/null
end
complete -c podloader -a '(__podloader)'
""",
}
SHELLS = tuple(_SCRIPTS)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A word that may stand there, and what it does."""

    word: str
    told: str


def completion(shell: str, words: Sequence[str]) -> str:
    """Return the script for *shell*; with *words*, what may stand in place of their last."""
    from loader.cli.parser import build_parser

    if not words:
        return _SCRIPTS[shell]
    show = _LINES[shell]
    return "".join(f"{show(found)}\n" for found in complete(build_parser(), words))


def complete(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[Candidate]:
    """Return what may stand in place of the last of *words*; nothing where that is a file."""
    *before, last = [word for word in words if word != "="]  # bash takes --option=value apart
    waits: argparse.Action | None = None
    options = _options(parser)
    for word in before:
        if word == "--":
            return []  # what stands behind it is vLLM's
        if waits is not None:
            waits = None
        elif word in options:
            waits = options[word] if _takes_value(options[word]) else None
        elif (inner := _commands(parser).get(word)) is not None:
            parser, options = inner, _options(inner)
    prefix = ""
    if waits is None and last.startswith("--") and "=" in last:
        name, _, last = last.partition("=")
        waits, prefix = options.get(name), f"{name}="
    found = _values(waits) if waits is not None else _words(parser, last)
    return [Candidate(prefix + c.word, c.told) for c in found if c.word.startswith(last)]


def _words(parser: argparse.ArgumentParser, last: str) -> Iterator[Candidate]:
    """Yield options where one is begun, else commands, or what a place of its own may hold."""
    if last.startswith("-"):
        for name, action in _options(parser).items():
            if action.help is not argparse.SUPPRESS and (name.startswith("--") or last == name):
                yield Candidate(name, action.help or "")
        return
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                yield Candidate(str(choice.dest), choice.help or "")
        elif not action.option_strings and action.choices:
            yield from _values(action)


def _values(action: argparse.Action) -> Iterator[Candidate]:
    """Yield what may be given to *action*."""
    if action.dest == "set_":
        from loader.config.settings import setting_defaults, setting_description

        for name in setting_defaults():
            yield Candidate(f"{name}=", setting_description(name))
    for choice in action.choices or ():
        yield Candidate(str(choice), "")


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {name: action for action in parser._actions for name in action.option_strings}


def _commands(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}


def _takes_value(action: argparse.Action) -> bool:
    return action.nargs != 0


def _first_sentence(told: str) -> str:
    return " ".join(told.split()).partition(". ")[0].rstrip(".")


def _zsh_line(found: Candidate) -> str:
    word = found.word.replace(":", "\\:")
    return f"{word}:{_first_sentence(found.told)}" if found.told else word


_LINES: Mapping[str, Callable[[Candidate], str]] = {
    "bash": lambda found: found.word,
    "zsh": _zsh_line,
    "fish": lambda found: f"{found.word}\t{_first_sentence(found.told)}",
}
