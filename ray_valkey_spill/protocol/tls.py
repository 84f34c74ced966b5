"""TLS for connections: trusted CAs, client certificates, and sockets that gather as plain ones."""

from __future__ import annotations

import ssl
from collections.abc import Sequence

from ray_valkey_spill.config import Config, Endpoint
from ray_valkey_spill.errors import ConfigError, NotValkeyError, ServerRefusedError, SpillError
from ray_valkey_spill.units import Buffer

__all__ = ["TlsSocket", "context", "refusal"]

# Payload of a full TLS record, in bytes. Smaller buffers are gathered into one record.
_RECORD = 16 << 10


def context(config: Config) -> ssl.SSLContext:
    """Return the TLS context for connections of `config`. It always checks host names.

    Each call reads the files again, to find renewed certificates.

    Raises:
        ConfigError: a file cannot be used; the message names it.
    """
    ca, certificate, key = config.tls_ca_file, config.tls_cert_file, config.tls_key_file
    try:
        # With `ca`, trust no other CA: another CA's certificate does not belong to this server.
        made = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise ConfigError(
            f"tls_ca_file {ca!r} cannot be used: {_text(error)}",
            "It must be a PEM file that every node can read",
        ) from error
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    if certificate is not None:
        try:
            # OpenSSL would ask for the pass phrase of a key at the terminal.
            made.load_cert_chain(certificate, key, password=_no_pass_phrase)
        except (OSError, _PassPhraseError) as error:
            raise ConfigError(
                f"tls_cert_file {certificate!r} and tls_key_file {key!r} cannot be used: "
                f"{_text(error)}",
                "They must be PEM files that every node can read: a certificate, and its key "
                "without a pass phrase",
            ) from error
    return made


class _PassPhraseError(Exception):
    """The key of a certificate has a pass phrase."""


def _no_pass_phrase() -> str:
    raise _PassPhraseError("the key has a pass phrase")


def _text(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class TlsSocket:
    """An SSL socket with the two scatter-gather calls of a plain one that `Connection` uses.

    Both may transfer fewer bytes than requested, as on a plain socket.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock

    def sendmsg(self, parts: Sequence[Buffer]) -> int:
        if len(parts[0]) >= _RECORD:
            return self._sock.send(parts[0])
        gathered = bytearray()
        for part in parts:
            gathered += memoryview(part)[: _RECORD - len(gathered)]
            if len(gathered) == _RECORD:
                break
        return self._sock.send(gathered)

    def recvmsg_into(self, buffers: Sequence[memoryview]) -> tuple[int]:
        """Receive into the first of `buffers` only."""
        return (self._sock.recv_into(buffers[0]),)


def _hint(message: str) -> str:
    """Return the hint for OpenSSL's `message` about a certificate."""
    if "match" in message:  # "Hostname mismatch", "IP address mismatch"
        return "Name the host in url as its certificate does"
    if "expired" in message or "not yet valid" in message:
        return "Renew it, or correct the clock"
    if "self-signed" in message or "issuer" in message or "signature" in message:
        return "Give the CA that signed it as tls_ca_file"
    # "Missing Authority Key Identifier", and others: Python 3.13 enforces RFC 5280.
    return "Reissue it in accordance with RFC 5280, or give the right CA as tls_ca_file"


def refusal(error: BaseException | None, endpoint: Endpoint) -> SpillError | None:
    """Return the permanent error behind a failed handshake; None if a retry may succeed."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    if isinstance(error, ssl.SSLCertVerificationError):
        return ServerRefusedError(
            f"the certificate of {endpoint} is refused: {error.verify_message}",
            _hint(error.verify_message),
        )
    reason = error.reason or ""
    if "ALERT" in reason:
        return ServerRefusedError(
            f"{endpoint} refuses the TLS connection: {reason.replace('_', ' ').lower()}",
            "Give a client certificate that it accepts as tls_cert_file and tls_key_file",
        )
    if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
        return NotValkeyError(
            f"the server at {endpoint} does not speak TLS",
            "Use valkey:// in url, or correct host and port",
        )
    return None
