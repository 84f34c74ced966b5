"""Servers that speak TLS: real ones, and a front before those that do not."""

from __future__ import annotations

import contextlib
import functools
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import valkey

from support.certificates import NAMES, Certificates, make_certificates
from support.servers import Contents, Node, free_port, server_binary, wait_until

_PIECE = 1 << 16


@dataclass(frozen=True)
class TLSServer(Contents):
    """What a user connects to.

    Attributes:
        url: of the port that speaks TLS.
        client: speaks TLS, with a certificate, and does not mind the server's names.
        certificates: the server's, and those that its clients need.
    """

    url: str
    port: int
    client: valkey.Valkey
    certificates: Certificates


@functools.cache
def tls_binary() -> Path | None:
    """A server built with TLS: the tests' own, or the system's `redis-server`, or none."""
    candidates = [str(server_binary()), shutil.which("redis-server")]
    return next((Path(path) for path in candidates if path and _knows_tls(path)), None)


def _knows_tls(binary: str) -> bool:
    """Whether it stumbles over the lack of a certificate, and not over TLS itself."""
    config = b"port 0\ntls-port 1\n"
    tried = subprocess.run([binary, "-"], input=config, capture_output=True, check=False)
    return b"Failed to configure TLS" in tried.stdout


@contextlib.contextmanager
def tls_server(
    directory: Path,
    client_certificate_required: bool = False,
    names: Sequence[str] = NAMES,
    **config: Any,
) -> Iterator[TLSServer]:
    """A server that listens with TLS alone; only where there is a `tls_binary`.

    Args:
        names: those in its certificate.
        config: as in valkey.conf, with underscores for dashes.
    """
    certificates = make_certificates(directory / "certificates", names)
    tls_port = free_port()
    settings = {"tls-auth-clients": client_certificate_required, **config}
    node = tls_node(directory / "server", tls_port, certificates, settings)
    with contextlib.closing(node):
        node.start()
        wait_until(node.serves)
        yield TLSServer(_url(tls_port), tls_port, node.client, certificates)


def tls_node(
    directory: Path,
    port: int,
    certificates: Certificates,
    config: Mapping[str, Any],
    arguments: Sequence[str] = (),
) -> Node:
    """A server that speaks TLS alone, with its clients and with other servers; see `Node`."""
    settings = {
        "port": 0,
        "tls-port": port,
        "tls-ca-cert-file": certificates.ca,
        "tls-cert-file": certificates.server.certificate,
        "tls-key-file": certificates.server.key,
        # What it shows where it is the client.
        "tls-client-cert-file": certificates.client.certificate,
        "tls-client-key-file": certificates.client.key,
        "tls-replication": True,
        **config,
    }
    return Node(
        directory,
        port,
        settings,
        arguments=arguments,
        binary=tls_binary(),
        **tls_client(certificates),
    )


@contextlib.contextmanager
def tls_front(
    directory: Path,
    server_port: int,
    client_certificate_required: bool = False,
    names: Sequence[str] = NAMES,
    expired: bool = False,
) -> Iterator[TLSServer]:
    """The same before the server without TLS at `server_port`, by a proxy of this process."""
    certificates = make_certificates(directory / "certificates", names, expired)
    with (
        contextlib.closing(_Front(server_port, certificates, client_certificate_required)) as front,
        valkey.Valkey(port=front.port, **tls_client(certificates)) as client,
    ):
        yield TLSServer(_url(front.port), front.port, client, certificates)


def _url(port: int) -> str:
    return f"valkeys://127.0.0.1:{port}/0"


def tls_client(certificates: Certificates) -> dict[str, Any]:
    """How valkey-py connects, with a certificate, whatever names a server has."""
    return {
        "ssl": True,
        "ssl_ca_certs": str(certificates.ca),
        "ssl_certfile": str(certificates.client.certificate),
        "ssl_keyfile": str(certificates.client.key),
        "ssl_check_hostname": False,
    }


class _Front:
    """Ends TLS, and forwards what was in it to `server_port`."""

    def __init__(
        self, server_port: int, certificates: Certificates, client_certificate_required: bool
    ) -> None:
        self._upstream = server_port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        pair = certificates.server
        self._context.load_cert_chain(pair.certificate, pair.key)
        self._context.load_verify_locations(certificates.ca)
        if client_certificate_required:
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._links: dict[threading.Thread, _Link] = {}
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def close(self) -> None:
        # Closing alone would leave accept() waiting.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        for thread, link in list(self._links.items()):
            link.cut()
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                link = _Link(client, self._context)
                thread = threading.Thread(target=self._serve, args=(link,))
                self._links[thread] = link
                thread.start()

    def _serve(self, link: _Link) -> None:
        try:
            link.serve(self._upstream)
        finally:
            del self._links[threading.current_thread()]


class _Link:
    """A client's connection, and the one to the server that belongs to it.

    An `ssl` socket may not be read by one thread while another writes to it. So each direction
    has a socket's end to wait on, and both share what holds the keys, for as long as it takes to
    open or to seal a piece.
    """

    def __init__(self, client: socket.socket, context: ssl.SSLContext) -> None:
        self._client = client
        self._server = socket.socket()
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._to_send, server_side=True)
        self._lock = threading.Lock()

    def serve(self, port: int) -> None:
        """Forward both ways, until either side ends it."""
        back = threading.Thread(target=self._seal_all)
        try:
            with contextlib.suppress(OSError):
                self._shake_hands()
                self._server.connect(("127.0.0.1", port))
                back.start()
                self._open_all()
        finally:
            self.cut()
            if back.ident is not None:
                back.join()
            self._client.close()
            self._server.close()

    def cut(self) -> None:
        """Have both threads see the end of what they read."""
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _shake_hands(self) -> None:
        try:
            while True:
                try:
                    return self._tls.do_handshake()
                except ssl.SSLWantReadError:
                    self._client.sendall(self._to_send.read())
                    data = self._client.recv(_PIECE)
                    if not data:
                        raise ConnectionError from None
                    self._received.write(data)
        finally:
            # The last of the handshake, or why there is none.
            self._client.sendall(self._to_send.read())

    def _open_all(self) -> None:
        data = b""  # the client's first words may have come with the end of the handshake
        while True:
            pieces = []
            with self._lock:
                self._received.write(data)
                # What TLS itself has to answer goes with the server's next bytes.
                with contextlib.suppress(ssl.SSLWantReadError):
                    while piece := self._tls.read(_PIECE):
                        pieces.append(piece)
            self._server.sendall(b"".join(pieces))
            data = self._client.recv(_PIECE)
            if not data:
                return

    def _seal_all(self) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := self._server.recv(_PIECE):
                    with self._lock:
                        self._tls.write(data)
                        sealed = self._to_send.read()
                    self._client.sendall(sealed)
                with self._lock, contextlib.suppress(ssl.SSLWantReadError):
                    self._tls.unwrap()
                self._client.sendall(self._to_send.read())
        finally:
            self.cut()
