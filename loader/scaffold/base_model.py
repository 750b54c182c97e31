"""The base model of adapters: its config.json and how large it is, without its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loader.config.values import user_path
from loader.errors import AdapterError, ConfigError, FetchError
from loader.http.client import HttpOptions
from loader.prepare.named_base import named_base
from loader.scaffold.survey import Found
from loader.stores.hub import REPO_ID, describe_model
from loader.stores.hub_requests import ask_as_we_do
from loader.weights.inspect import read_json

_BILLIONS = re.compile(r"(?:^|[-_])(\d+(?:\.\d+)?)[bB](?:$|[-_.])")
# A dense decoder of that many billion parameters: layers, hidden, heads, key-value heads,
# intermediate, as the Llama family has them. Stands in where only a model's name is known.
_FAMILY = (
    (2, (16, 2048, 32, 8, 8192)),
    (5, (28, 3072, 24, 8, 8192)),
    (10, (32, 4096, 32, 8, 14336)),
    (20, (40, 5120, 40, 40, 13824)),
    (40, (64, 5120, 40, 8, 27648)),
    (90, (80, 8192, 64, 8, 28672)),
    (1e9, (126, 16384, 128, 8, 53248)),
)


@dataclass(frozen=True, slots=True)
class Base:
    """A base model by ``name``: ``weight_bytes`` is None where nobody knows."""

    name: str
    config: Mapping[str, object]
    weight_bytes: int | None
    came_from: str


def choose_base(adapters: Sequence[Found], asked: str | None) -> str:
    """Return *asked*, else the one base model that all adapters' configs name.

    Raises:
        ConfigError: they name none, several, or one that only a person may choose.
    """
    if asked:
        return asked
    try:
        return named_base({f.path: f.config.get("base_model_name_or_path") for f in adapters}).name
    except AdapterError as error:
        raise ConfigError(
            error.what, problems=error.problems, next_step="give --base-model"
        ) from None


def describe_base(name: str) -> Base:
    """Return the base model *name*: a folder here, a model of the Hub, or what its name says.

    Raises:
        ConfigError: nothing tells how large it is.
    """
    folder = user_path(name)
    if (folder / "config.json").is_file():
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return Base(name, read_json(folder / "config.json"), size or None, "its files")
    why = "no folder here, and no Hugging Face id"
    if REPO_ID.fullmatch(name):
        try:
            ask_as_we_do(HttpOptions())
            found = describe_model(name)
            return Base(name, found.config, found.weight_bytes, "the Hub")
        except (ConfigError, FetchError) as error:
            why = error.what
    if match := _BILLIONS.search(name.rpartition("/")[2]):
        billions = float(match[1])
        config = _family(billions)
        return Base(name, config, int(billions * 2e9), f"{match[1]}B in its name ({why})")
    raise ConfigError(
        "nothing tells how large the base model is",
        where=name,
        got=why,
        next_step="give --base-model as a folder or an id of the Hub that can be reached",
    )


def _family(billions: float) -> dict[str, object]:
    names = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
    )
    shape = next(shape for limit, shape in _FAMILY if billions <= limit)
    return dict(zip(names, shape, strict=True)) | {"dtype": "bfloat16"}
