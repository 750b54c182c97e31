"""The certificates that TLS trusts and shows: the system's, those of a bundle, our servers' own.

The system keeps its certificates twice, in one file and in a directory by their subjects' hashes.
To read all of the file takes 25 ms before a first request; the directory gives the few that are
asked for. What it does not know, such as a bundle that was put in the file's place alone, the file
is asked for.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
import threading
from pathlib import Path

from loader.errors import ConfigError, FetchError

_log = logging.getLogger("podloader")
_HASHED = re.compile(r"[0-9a-f]{8}\.\d+")


class Trust:
    """What one client trusts. Every method may be called from any thread.

    *only*: a server's own certificate, which is trusted alone, whatever the server is called.
    """

    def __init__(self, ca_bundle: Path | None, only: Path | None = None) -> None:
        self._ca_bundle = ca_bundle
        self._only = only
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._may_widen = False

    def context(self) -> ssl.SSLContext:
        """Return the context of every connection.

        Raises:
            FetchError: the bundle cannot be read.
        """
        with self._lock:
            if self._context is None and self._only is not None:
                self._context = pinned_context(self._only)
            if self._context is None:
                directory = _hashed_directory()
                self._may_widen = directory is not None
                context = ssl.create_default_context(capath=directory)
                context.hostname_checks_common_name = False  # RFC 9110, 4.3.4
                if self._ca_bundle:
                    _load(context, self._ca_bundle)
                self._context = context
            return self._context

    def widen(self) -> bool:
        """Trust all that the system does; return whether that may be more than before."""
        with self._lock:
            if self._context is not None and self._may_widen:
                self._context.load_default_certs()
            return self._may_widen


def pinned_context(certificate: Path) -> ssl.SSLContext:
    """Return what trusts *certificate* alone, by whatever name its server is reached.

    Raises:
        FetchError: it cannot be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # addresses of pods come and go; the key tells who it is
    _load(context, certificate)
    return context


def server_tls(
    certificate: Path,
    key: Path | None,
    clients: Path | None = None,
    *,
    verify: ssl.VerifyMode = ssl.CERT_NONE,
    ciphers: str | None = None,
) -> ssl.SSLContext:
    """Return what serves https by the files of a certificate and its key.

    *clients* holds the authorities of clients' certificates, *verify* whether those have to come.

    Raises:
        ConfigError: they cannot be read, or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
        context.verify_mode = verify
        if clients is not None:
            context.load_verify_locations(clients)
        if ciphers:
            context.set_ciphers(ciphers)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            "the TLS certificate cannot be read",
            where=", ".join(str(path) for path in (certificate, key, clients) if path),
            got=str(error),
            next_step="give PEM files of a certificate and of the key that belongs to it",
        ) from None
    return context


def _hashed_directory() -> str | None:
    """Return the system's directory of certificates, None where there is none to be used."""
    paths = ssl.get_default_verify_paths()
    if named := os.environ.get(paths.openssl_cafile_env):
        if not os.access(named, os.R_OK):  # OpenSSL goes without it and says nothing
            _log.warning("%s=%s cannot be read", paths.openssl_cafile_env, named)
        return None
    if not paths.capath:
        return None
    try:
        is_hashed = any(_HASHED.fullmatch(path.name) for path in Path(paths.capath).iterdir())
    except OSError:
        return None
    return paths.capath if is_hashed else None


def _load(context: ssl.SSLContext, bundle: Path) -> None:
    try:
        context.load_verify_locations(cafile=bundle)
    except (OSError, ssl.SSLError) as error:
        raise FetchError(
            "the CA bundle cannot be read",
            where=str(bundle),
            expected="a PEM file of certificates",
            got=str(error.strerror or error),
            next_step="correct ca_bundle",
        ) from None
