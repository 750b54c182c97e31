"""Which trainer's own names and layout a checkpoint has, and the view of it as transformers'."""

from __future__ import annotations

from pathlib import Path

from loader.weights.formats import megatron, titan
from loader.weights.formats.rank_files import Files
from loader.weights.formats.views import OpenableTensors, ViewSource, read_heads
from loader.weights.inspect import read_json


def find_view(source: OpenableTensors, files: Files, config: Path, where: str) -> ViewSource | None:
    """Return *source* as transformers lays it out; None where it is so, but for prefixes.

    Raises:
        UnsupportedError: tensors that transformers has no place for.
        CheckpointError: tensors that are not the model's of *config*, or it lacks their sizes.
    """
    is_megatron = megatron.is_megatron(source.shapes)
    if not is_megatron and not titan.is_titan(source.shapes):
        return None
    fields = read_json(config)
    heads = read_heads(fields, str(config))
    model_type = str(fields.get("model_type", ""))
    if is_megatron:
        megatron.refuse_other_models(files, model_type, where)
        return ViewSource(source, megatron.find_views(source.shapes, heads, where))
    return ViewSource(source, titan.find_views(source.shapes, heads, model_type, where))
