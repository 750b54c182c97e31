"""Token ids that a tokenizer gives and a model has no row for: a server ends at the first of them.

Read from the tokenizer's own JSON files, as text alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from loader.errors import FormatError
from loader.weights.inspect import read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json")


def warn_of_ids(tokenizer: Path, model: Path) -> str | None:
    """Return what is wrong with the tokenizer in one folder for the model in another, if it is."""
    files = {}
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            files[name] = _read(tokenizer / name)
    return describe_ids(files, _read(model / "config.json"))


def _read(path: Path) -> Mapping[str, object]:
    try:
        return read_json(path)
    except FormatError:
        return {}  # whoever needs it tells more


def describe_ids(
    files: Mapping[str, Mapping[str, object]], config: Mapping[str, object]
) -> str | None:
    """Return it of a tokenizer's *files*, JSON by name, and a model's config."""
    if not isinstance(config, dict) or not all(isinstance(f, dict) for f in files.values()):
        return None
    text = config.get("text_config")
    rows = config.get("vocab_size")
    if type(rows) is not int and isinstance(text, dict):
        rows = text.get("vocab_size")
    if type(rows) is not int:
        return None
    beyond = {i: token for content in files.items() for token, i in _ids(*content) if i >= rows}
    if not beyond:
        return None
    shown = ", ".join(f"{token!r} is {i}" for i, token in sorted(beyond.items())[:3])
    return f"{len(beyond)} tokens of the tokenizer are beyond the model's {rows} rows: {shown}"


def _ids(name: str, content: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Yield tokens and their ids, as Hugging Face's files hold them."""
    found: object = content
    if name == "tokenizer.json":
        model, added = content.get("model"), content.get("added_tokens")
        for entry in added if isinstance(added, list) else ():
            if isinstance(entry, dict) and type(entry.get("id")) is int:
                yield str(entry.get("content")), entry["id"]
        found = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(found, list):
            found = {str(e[0]): i for i, e in enumerate(found) if isinstance(e, list) and e}
    elif name == "tokenizer_config.json":
        found = content.get("added_tokens_decoder")
        if isinstance(found, dict):
            found = {str(e): int(i) for i, e in found.items() if str(i).isdecimal()}
    for token, i in found.items() if isinstance(found, dict) else ():
        if type(i) is int:
            yield str(token), i
