"""The small files that a server needs beside the weights, from whichever rank has them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from loader.weights.formats.places import CONFIG
from loader.weights.inspect import SHARE, read_json
from loader.weights.quantised import HF_QUANT_CONFIG, without_quantisation
from loader.weights.side_files import list_side_files


def find_sidecars(folders: Sequence[Path]) -> Mapping[str, Path]:
    """Return name -> file of what stands beside the weights; the first folder's counts.

    Raises:
        FormatError: one of them is no file.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        found = list_side_files(folder, SHARE.__eq__) | found
    return MappingProxyType(found)


def write_sidecars(sidecars: Mapping[str, Path], folder: Path, *, dtype: str | None) -> None:
    """Copy *sidecars* into *folder*; config.json says *dtype* ("bfloat16"), what is stored.

    Plain weights are written then, whatever was said of a quantisation, which an engine believes.

    Raises:
        FormatError: config.json is malformed.
    """
    for name, path in sidecars.items():
        if dtype and name == HF_QUANT_CONFIG:
            continue
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    if dtype and CONFIG in sidecars:
        config = without_quantisation(read_json(sidecars[CONFIG]))
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
