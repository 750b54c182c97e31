"""What a model of the Hub is made of, told from the headers of its weights and a few bytes more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loader.stores.hub_errors import translate_error
from loader.threads import map_on_threads

_ANSWER_S = 10
_LENGTH_BYTES = 8
_THREADS = 16


class _WholeFileError(Exception):
    """The Hub answers a range with the whole file."""


@dataclass(frozen=True, slots=True)
class HubTensor:
    """A tensor of a model on the Hub: bytes [start, end) of the data of *file*.

    ``dtype`` as in "BF16"; the data of a file begin behind its header.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int


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
        name: HubTensor(tensor.dtype, tuple(tensor.shape), file, *tensor.data_offsets)
        for file, about in found.files_metadata.items()
        for name, tensor in about.tensors.items()
    }


def read_values(
    repo_id: str,
    revision: str | None,
    tensors: Mapping[str, HubTensor],
    *,
    token: str | None = None,
) -> Mapping[str, bytes] | None:
    """Return the bytes of *tensors*, small ones, by name; each is read by a range of its own.

    None where the Hub sends whole files instead.

    Raises:
        FetchError: the Hub refuses.
        TransientError: the Hub did not answer.
    """
    import huggingface_hub.utils

    http: Any = huggingface_hub.utils

    def read(file: str, start: int, end: int) -> bytes:
        headers = http.build_hf_headers(token=token) | {"Range": f"bytes={start}-{end - 1}"}
        url = huggingface_hub.hf_hub_url(repo_id, file, revision=revision)
        with http.http_stream_backoff("GET", url, headers=headers, timeout=_ANSWER_S) as answer:
            if answer.is_error:
                answer.read()
                http.hf_raise_for_status(answer)
            if answer.status_code != 206:
                raise _WholeFileError
            content: bytes = answer.read()
            return content

    def data_start(file: str) -> int:
        return _LENGTH_BYTES + int.from_bytes(read(file, 0, _LENGTH_BYTES), "little")

    def read_tensor(tensor: HubTensor) -> bytes:
        start = starts[tensor.file]
        return read(tensor.file, start + tensor.start, start + tensor.end)

    files = sorted({tensor.file for tensor in tensors.values()})
    try:
        starts = dict(zip(files, map_on_threads(data_start, files, _THREADS), strict=True))
        values = map_on_threads(read_tensor, tuple(tensors.values()), _THREADS)
        return dict(zip(tensors, values, strict=True))
    except _WholeFileError:
        return None
    except Exception as error:
        raise translate_error(error, repo_id, revision) from None
