"""Ranges of files of a model on the Hub, which stay there."""

from __future__ import annotations

from typing import Any

from loader.errors import FetchError
from loader.stores.hub_errors import translate_error

_ANSWER_S = 10


class WholeFileError(FetchError):
    """The Hub answers a range with the whole file."""


def read_range(
    repo_id: str, revision: str, name: str, start: int, buffer: memoryview, *, token: str | None
) -> None:
    """Fill *buffer* with the bytes of the file *name* from *start* on.

    Raises:
        WholeFileError: the Hub gives no ranges.
        ConfigError: no right to read it.
        FetchError: the Hub refuses.
        TransientError: the Hub did not answer.
    """
    import huggingface_hub.utils

    http: Any = huggingface_hub.utils
    span = f"bytes={start}-{start + len(buffer) - 1}"
    headers = http.build_hf_headers(token=token) | {"Range": span}
    url = huggingface_hub.hf_hub_url(repo_id, name, revision=revision)
    try:
        with http.http_stream_backoff("GET", url, headers=headers, timeout=_ANSWER_S) as answer:
            if answer.is_error:
                answer.read()
                http.hf_raise_for_status(answer)
            content = answer.read() if answer.status_code == 206 else b""
    except Exception as error:
        raise translate_error(error, repo_id, revision) from None
    if len(content) != len(buffer):
        raise WholeFileError("the Hub gives no ranges of its files", where=f"{repo_id}/{name}")
    buffer[:] = content
