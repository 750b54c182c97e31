"""A pickled adapter as safetensors: read once, by us and tensors alone, and never by an engine."""

from __future__ import annotations

import shutil
from pathlib import Path

from loader.adapters.surroundings import TEMPLATE_FILES, TOKENIZER_FILES
from loader.weights.inspect import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from loader.weights.publishing import PartialFolder, disk_error
from loader.weights.stored import find_weight_files


def as_safetensors(folder: Path, output: Path) -> Path:
    """Return the folder of an adapter in safetensors: *folder*, or *output* where it is pickled.

    What is in *output* from an earlier run is replaced.

    Raises:
        FormatError: the pickle holds more than tensors, or is broken.
        DiskError: the disk refused.
    """
    if not find_weight_files(folder, "adapter_model").pickled:
        return folder
    from safetensors.torch import save_file

    from loader.weights.readers import open_weights

    reader = open_weights(folder, stem="adapter_model", allow_pickle=True)
    tensors = {name: reader.read(name).contiguous().clone() for name in reader.tensors}
    shutil.rmtree(output, ignore_errors=True)
    with PartialFolder(output) as partial:
        try:
            for name in (ADAPTER_CONFIG, *TOKENIZER_FILES, *TEMPLATE_FILES):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, partial.path / name)
            save_file(tensors, partial.path / ADAPTER_WEIGHTS[0], metadata={"format": "pt"})
        except OSError as error:
            raise disk_error(output, error) from error
    return output
