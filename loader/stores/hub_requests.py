"""How huggingface-hub asks: by podloader's own client, as every other origin is asked.

Its own HTTP library limits each wait and nothing limits all of them, and takes a certificate's
common name for a host. So does what reads from Xet, which is left out, see ``hub_bodies``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from loader.errors import DeniedError, ExpiredError, TransientError
from loader.http.body import HttpStream
from loader.http.client import REDIRECTS, HttpClient, HttpOptions
from loader.stores.hub_bodies import LargeBodies, leave_out_xet
from loader.stores.hub_errors import unanswered

_READ_BYTES = 1 << 20
_OWN = {"host", "content-length", "transfer-encoding", "connection", "accept-encoding"}


def ask_as_we_do(options: HttpOptions) -> None:
    """Let huggingface-hub, in this process, ask by *options*; not where a user set its client.

    Who names a Hub may name one of the machine's own link; a redirect of it may not lead there.
    """
    import huggingface_hub.utils

    library: Any = huggingface_hub.utils
    before = library.get_session()
    set_by = getattr(sys.modules[library.get_session.__module__], "_GLOBAL_CLIENT_FACTORY", None)
    if getattr(set_by, "__name__", "") != "default_client_factory":
        return
    http: Any = sys.modules[type(before).__module__.partition(".")[0]]  # httpx, by what name ever
    hooks: Mapping[str, Any] = before.event_hooks  # which see to HF_HUB_OFFLINE
    leave_out_xet()
    transport = _transport(http, replace(options, link_local=True))
    library.set_client_factory(
        lambda: http.Client(
            transport=transport(),
            event_hooks=hooks,
            follow_redirects=True,
            timeout=None,
            trust_env=False,  # our client reads what the environment says of proxies
        )
    )


def _transport(http: Any, options: HttpOptions) -> Any:
    """Return a class of transports for the library *http*, which are our client each."""

    class Body(http.SyncByteStream):  # type: ignore[misc]
        def __init__(self, stream: HttpStream, pieces: Iterator[bytes]) -> None:
            self._stream, self._pieces = stream, pieces

        def __iter__(self) -> Iterator[bytes]:
            try:
                yield from self._pieces
            except (TransientError, ExpiredError, DeniedError) as error:  # who asks anew is told
                raise http.RemoteProtocolError(error.what) from error

        def close(self) -> None:
            self._stream.close()

    class Transport(http.BaseTransport):  # type: ignore[misc]
        def __init__(self) -> None:
            self._client = HttpClient(options)
            self._large = LargeBodies(self._client)

        def handle_request(self, request: Any) -> Any:
            url = str(request.url)
            headers = {n: v for n, v in request.headers.items() if n not in _OWN}
            try:
                status, fields, stream = self._client.exchange(
                    request.method, url, headers=headers, body=request.read() or None
                )
            except TransientError as error:
                raise unanswered(error) from None
            if status in REDIRECTS:
                with contextlib.closing(stream):  # whose body nobody reads
                    self._client.follow(url, fields.get("location"))
                return http.Response(status, headers=fields)
            pieces = _pieces(stream)
            if request.method == "GET" and (span := self._large.span(url, status, fields)):
                pieces = self._large.read(url, headers, fields, span, stream)
            return http.Response(status, headers=fields, stream=Body(stream, pieces))

        def close(self) -> None:
            self._client.close()

    return Transport


def _pieces(stream: HttpStream) -> Iterator[bytes]:
    buffer = memoryview(bytearray(_READ_BYTES))
    while count := stream.read_coded(buffer):
        yield bytes(buffer[:count])
