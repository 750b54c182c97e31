"""What stands beside the weights of a model: config, tokenizer, chat template, generation config.

A tokenizer or chat template that came with the adapter was fine-tuned with it and wins over the
base's; several adapters must agree, for one server has one tokenizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from loader.errors import AdapterError
from loader.weights.byte_files import regular_files
from loader.weights.inspect import read_json
from loader.weights.publishing import PartialFolder, disk_error
from loader.weights.quantised import without_quantisation
from loader.weights.side_files import list_side_files

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
# Any of these alone is a tokenizer; the others only describe one.
_VOCABULARIES = frozenset(TOKENIZER_FILES[:9]) - {"merges.txt"}
_TIED = "tie_word_embeddings"  # each model of several heeds the one of its own config


def list_surroundings(base: Path, adapters: Sequence[Path]) -> dict[str, Path]:
    """Return the files that stand beside the merged weights, by name.

    Raises:
        AdapterError: adapters whose tokenizers or chat templates differ.
        FormatError: one of the files is none.
    """
    return list_side_files(base, _is_token_file) | list_tokenizer(base, adapters)


def list_tokenizer(base: Path, adapters: Sequence[Path]) -> dict[str, Path]:
    """Return the files of the tokenizer and chat template to be served, by name.

    Raises:
        AdapterError: adapters whose tokenizers or chat templates differ.
        FormatError: one of the files is none.
    """
    own = [_files_of(folder, TOKENIZER_FILES) for folder in adapters]
    own = [files for files in own if _VOCABULARIES & set(files)]
    _check_alike(own, "tokenizers")
    templates = [_template_of(folder) for folder in adapters]
    templates = [files for files in templates if files]
    _check_alike(templates, "chat templates")
    tokenizer = own[0] if own else _files_of(base, TOKENIZER_FILES)
    if templates:
        return tokenizer | {n: p for n, p in templates[0].items() if n in TEMPLATE_FILES}
    return tokenizer | ({} if _speaks(tokenizer) else _files_of(base, TEMPLATE_FILES))


def has_tokenizer(*folders: Path) -> bool:
    """Return whether one of *folders* holds a vocabulary. Raises FormatError: one is no file."""
    if any(_files_of(folder, sorted(_VOCABULARIES)) for folder in folders):
        return True
    return any(name.endswith(".tiktoken") for folder in folders for name in _names(folder))


def write_tokenizer(base: Path, adapters: Sequence[Path], output: Path) -> Path:
    """Return a folder with the tokenizer to be served: one that is there, else *output*, filled.

    Raises:
        AdapterError: adapters whose tokenizers or chat templates differ.
        FormatError: one of the files is none.
        DiskError: the disk refused.
    """
    files = list_tokenizer(base, adapters)
    folders = {path.parent for path in files.values()}
    if len(folders) == 1 and (base in folders or "config.json" in _names(next(iter(folders)))):
        return next(iter(folders))
    with PartialFolder(output) as partial:
        try:
            # Engines look for the model's type beside the tokenizer.
            for name, path in {**_files_of(base, ("config.json",)), **files}.items():
                shutil.copyfile(path, partial.path / name)
        except OSError as error:
            raise disk_error(output, error) from error
    return output


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _is_token_file(name: str) -> bool:
    return name in TOKENIZER_FILES or name in TEMPLATE_FILES


def _files_of(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    return {path.name: path for path in regular_files(folder / name for name in names)}


def _template_of(folder: Path) -> dict[str, Path]:
    """Return the file that holds the chat template that came with an adapter."""
    files = _files_of(folder, TEMPLATE_FILES)
    config = _files_of(folder, ("tokenizer_config.json",))
    return files or (config if _speaks(config) else {})


def _speaks(tokenizer: Mapping[str, Path]) -> bool:
    """Return whether the tokenizer's own config holds a chat template."""
    config = tokenizer.get("tokenizer_config.json")
    return config is not None and bool(read_json(config).get("chat_template"))


def _check_alike(found: Sequence[Mapping[str, Path]], what: str) -> None:
    if not found:
        return
    contents = [{name: path.read_bytes() for name, path in files.items()} for files in found]
    differing = [
        str(next(iter(files.values())).parent)
        for files, content in zip(found, contents, strict=True)
        if content != contents[0]
    ]
    if differing:
        first = str(next(iter(found[0].values())).parent)
        raise AdapterError(
            f"adapters that came with different {what}",
            problems=[first, *differing],
            expected="one for all, since a server has one",
            next_step="serve them apart, or leave the tokenizer files out of the paths",
        )


def write_config(source: Path, target: Path, changes: Mapping[str, object]) -> None:
    """Write ``config.json`` of plain weights with *changes*; ``text_config`` has its own of them.

    Raises:
        OSError: the disk refused.
    """
    stored = read_json(source)
    config = without_quantisation(stored)
    if not changes and config == stored:
        shutil.copyfile(source, target)
        return
    text = config.get("text_config")
    for key, value in changes.items():
        if isinstance(text, dict) and (key in text or key == _TIED):
            text[key] = value
        if not isinstance(text, dict) or key in config or key not in text or key == _TIED:
            config[key] = value
    target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
