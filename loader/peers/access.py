"""Who may ask a pod for chunks: who holds the shared token, which never travels.

::

    GET /hello                         -> {"id": …, "nonce": …}, to anybody
    GET /objects/<object>/<number>
        Podloader-Ask: <nonce of the caller's> <HMAC of "ask", both nonces and the target>
    -> Podloader-Proof: <HMAC of "answer", both nonces, the target and the digest that it tells>

The answer's proof shows that the peer holds the token, too, and that the digest is from it. The
bytes themselves are hidden and kept whole by TLS alone, where a certificate is given.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from loader.config.credentials import Secret

ASK, PROOF, SENDER = "Podloader-Ask", "Podloader-Proof", "Podloader-From"


class Token:
    """The shared secret."""

    def __init__(self, secret: Secret) -> None:
        self._key = secret.value.encode()

    def ask(self, nonce: str, target: str) -> tuple[str, str]:
        """Return a nonce of the caller's own, and the header that asks a peer with *nonce*."""
        own = new_nonce()
        return own, f"{own} {self._sign('ask', nonce, own, target)}"

    def may_ask(self, header: str, nonce: str, target: str) -> str | None:
        """Return the caller's nonce where *header* shows that it holds the token."""
        own, _, said = header.partition(" ")
        expected = self._sign("ask", nonce, own, target)
        return own if hmac.compare_digest(_bytes(said), _bytes(expected)) else None

    def prove(self, nonce: str, own: str, target: str, digest: str) -> str:
        """Return the header of the answer to what *own* asked."""
        return self._sign("answer", nonce, own, target, digest)

    def is_proof(self, said: str, nonce: str, own: str, target: str, digest: str) -> bool:
        """Return whether the answer is from one that holds the token."""
        expected = self.prove(nonce, own, target, digest)
        return hmac.compare_digest(_bytes(said), _bytes(expected))

    def _sign(self, *parts: str) -> str:
        return hmac.new(self._key, _bytes("\n".join(parts)), hashlib.sha256).hexdigest()


def _bytes(said: str) -> bytes:
    return said.encode(errors="surrogatepass")  # JSON may hold what is no text


def new_nonce() -> str:
    """Return a text that nobody has used before."""
    return secrets.token_hex(16)
