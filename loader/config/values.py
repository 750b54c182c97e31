"""A config's or a variable's value -> a value of a setting's type, or what is wrong with it.

By msgspec: pydantic takes an eighth of a second before it checks its first value, and the first
byte of a download waits for the settings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from loader.json_text import parse_json

_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])?(i)?b)?", re.IGNORECASE)
_WORDS = {"yes": True, "on": True, "no": False, "off": False}  # besides true, false, 1 and 0

Bytes = Annotated[int, Meta(description="bytes")]
"""A count of bytes, which may be written such as ``16MiB``."""
Words = tuple[str, ...]
"""Texts, which may be written as a JSON list or as words between blanks."""


def read_value(value: object, kind: Any) -> Any:
    """Return *value* as *kind*, a type with msgspec's ``Meta`` of its limits if any.

    Texts are read as numbers and truth values, too, where these are wanted.

    Raises:
        ValueError: what was expected; the value itself is not in it.
    """
    if isinstance(value, str):
        value = _read_text(value, kind)
    try:
        return msgspec.convert(value, kind, strict=False, dec_hook=_make)
    except msgspec.ValidationError as error:
        if choices := _choices(kind):
            raise ValueError("expected " + " or ".join(map(repr, choices))) from None
        raise ValueError(str(error)) from None


def user_path(text: str) -> Path:
    """Return *text* as a path; ``~`` stays where nothing says what the user's home is."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no HOME, and no entry in passwd
        return Path(text)


def show_value(value: object) -> str:
    """Return *value* as JSON."""
    return msgspec.json.encode(value, enc_hook=str).decode()


def _read_text(text: str, kind: Any) -> object:
    if kind == Words:
        return _read_words(text)
    if _is_bytes(kind):
        return _read_bytes(text)
    return _WORDS.get(text.strip().lower(), text) if kind is bool else text


def _read_words(text: str) -> object:
    if not text.lstrip().startswith("["):
        return text.split()
    try:
        return parse_json(text)
    except ValueError:
        raise ValueError("expected a JSON list or words between blanks") from None


def _read_bytes(text: str) -> int:
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise ValueError("expected a count of bytes, such as 16MiB")
    number, unit, binary = match.groups()
    power = " kmgt".index(unit.lower()) if unit else 0
    count = float(number) * (1024 if binary else 1000) ** power
    if count >= 1 << 63:
        raise ValueError("expected a count of bytes that a disk may have, such as 16MiB")
    return int(count)


def _is_bytes(kind: Any) -> bool:
    metas = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return any(isinstance(meta, Meta) and meta.description == "bytes" for meta in metas)


def _choices(kind: Any) -> tuple[object, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(choice for part in get_args(kind) for choice in _choices(part))


def _make(kind: type, value: object) -> object:
    """Return what msgspec does not know by itself."""
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise ValueError("expected a path")
