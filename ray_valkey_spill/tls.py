"""TLS for connections: what is trusted and shown, and sockets that gather as plain ones do."""

from __future__ import annotations

import ssl
from collections.abc import Sequence

from ray_valkey_spill.config import Config, Endpoint
from ray_valkey_spill.errors import ConfigError, NotValkeyError, ServerRefusedError, SpillError
from ray_valkey_spill.format import Buffer

__all__ = ["TlsSocket", "context", "refusal"]

# The payload of a full TLS record: what is smaller is gathered into one.
_RECORD = 16 << 10


def context(config: Config) -> ssl.SSLContext:
    """What connections of `config` trust and show. Host names are checked, always.

    Its files are read anew each time, so that renewed certificates are found.

    Raises:
        ConfigError: naming the file that cannot be used.
    """
    made = ssl.create_default_context()
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    ca, certificate, key = config.tls_ca_file, config.tls_cert_file, config.tls_key_file
    if ca is not None:
        try:
            # Alone: a server that shows a certificate of another CA is not the one that is meant.
            made = ssl.create_default_context(cafile=ca)
            made.minimum_version = ssl.TLSVersion.TLSv1_2
        except OSError as error:
            raise ConfigError(
                f"tls_ca_file {ca!r} cannot be used: {_text(error)}",
                "It must be a PEM file that every node can read",
            ) from error
    if certificate is not None:
        try:
            # A key that has a pass phrase would be asked for at the terminal.
            made.load_cert_chain(certificate, key, password=_no_pass_phrase)
        except (OSError, _PassPhraseError) as error:
            raise ConfigError(
                f"tls_cert_file {certificate!r} and tls_key_file {key!r} cannot be used: "
                f"{_text(error)}",
                "They must be PEM files that every node can read, of a certificate and its key "
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
    """An SSL socket with the scatter-gather calls of a plain one, as far as they are used here.

    Both may transfer less than they are given, as those of a plain one may.
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
        """Fills the first of `buffers` alone."""
        return (self._sock.recv_into(buffers[0]),)


def refusal(error: BaseException | None, endpoint: Endpoint) -> SpillError | None:
    """What a failed handshake means that another attempt does not cure; None if there was none."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    if isinstance(error, ssl.SSLCertVerificationError):
        named = "match" in error.verify_message  # "Hostname mismatch", "IP address mismatch"
        return ServerRefusedError(
            f"the certificate that {endpoint} shows is refused: {error.verify_message}",
            "Name the host in url as its certificate does"
            if named
            else "Give the CA that signed it as tls_ca_file",
        )
    reason = error.reason or ""
    if "ALERT" in reason:
        return ServerRefusedError(
            f"{endpoint} refuses the TLS connection: {reason.replace('_', ' ').lower()}",
            "Give a client certificate that it accepts as tls_cert_file and tls_key_file",
        )
    if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
        return NotValkeyError(
            f"what answers at {endpoint} does not speak TLS",
            "Use valkey:// in url, or correct host and port",
        )
    return None
