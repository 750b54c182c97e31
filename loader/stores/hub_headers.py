"""What a model of the Hub is made of, told from the headers of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loader.stores.hub import _translate as translate_error


@dataclass(frozen=True, slots=True)
class HubTensor:
    """A tensor of a model on the Hub; ``dtype`` as in "BF16"."""

    dtype: str
    shape: tuple[int, ...]


def read_tensors(
    repo_id: str, revision: str | None = None, *, token: str | None = None
) -> Mapping[str, HubTensor] | None:
    """Return every tensor of *repo_id* by name, from its safetensors headers; nothing is fetched.

    None where that cannot be told: no safetensors there, or offline.

    Raises:
        ConfigError: no such model or revision, or no right to read it.
        TransientError: the Hub did not answer.
    """
    from huggingface_hub import HfApi, errors

    untold = (
        errors.NotASafetensorsRepoError,
        errors.SafetensorsParsingError,
        errors.OfflineModeIsEnabled,
    )
    try:
        found = HfApi(token=token).get_safetensors_metadata(repo_id, revision=revision)
    except untold:
        return None
    except Exception as error:
        raise translate_error(error, repo_id, revision) from None
    return {
        name: HubTensor(tensor.dtype, tuple(tensor.shape))
        for file in found.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
