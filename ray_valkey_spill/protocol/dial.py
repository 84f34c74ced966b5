"""Opens connections with valkey-py, which also authenticates, and translates its errors."""

from __future__ import annotations

import contextlib
import functools
import socket
from pathlib import Path
from typing import Any

import valkey.connection as client
import valkey.exceptions as client_errors

from ray_valkey_spill.config import Config, Endpoint
from ray_valkey_spill.errors import (
    ConfigError,
    NotValkeyError,
    ServerError,
    ServerRefusedError,
    SpillError,
    TooManyClientsError,
    TransientError,
)
from ray_valkey_spill.protocol import tls
from ray_valkey_spill.protocol.addresses import DIALER
from ray_valkey_spill.protocol.resp import not_now, reply_error

__all__ = ["dial", "does_not_answer", "not_valkey"]

_CONNECT_TIMEOUT = 5.0

# Keepalive starts after an idle minute: load balancers and NATs of the large clouds drop an idle
# connection after four minutes (Azure) or six (AWS). It detects a dead peer half a minute later.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}


class _TcpConnection(client.Connection):
    """valkey-py's connection, to the first of the host's addresses that answers."""

    def _connect(self) -> socket.socket:
        sock = DIALER.dial(self.host, self.port, self.socket_connect_timeout or _CONNECT_TIMEOUT)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.settimeout(self.socket_timeout)
        return sock


class _TlsConnection(_TcpConnection):
    """The same over TLS, with our own context, so that its errors can be told apart."""

    def __init__(self, config: Config, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._context = tls.context(config)

    def _connect(self) -> socket.socket:
        sock = super()._connect()
        try:
            return self._context.wrap_socket(sock, server_hostname=self.host)
        except TimeoutError:
            sock.close()
            # valkey-py would report this as a host that does not answer.
            raise OSError("It does not answer the TLS handshake") from None
        except BaseException as error:
            sock.close()
            if (refusal := tls.refusal(error, Endpoint(self.host, self.port))) is None:
                raise
            raise refusal from error


def dial(config: Config, endpoint: Endpoint, timeout: float, sentinel: bool) -> Any:
    """Return an open and authenticated connection of valkey-py. Errors as `Connection`."""
    password = _password(config)
    try:
        return _connected(config, endpoint, timeout, password, sentinel)
    except client_errors.AuthenticationError as error:
        if sentinel:
            # Sentinels have their own users, and often no password at all.
            with contextlib.suppress(client_errors.ValkeyError):
                return _connected(config, endpoint, timeout, None, sentinel)
        if _password(config) != password:
            raise TransientError(f"{endpoint} has a new password") from error
        raise _refused(config, endpoint, error, sentinel) from error
    except client_errors.ValkeyError as error:
        raise tls.refusal(error, endpoint) or _translated(config, endpoint, error) from error
    except SpillError:
        raise
    except (ValueError, RecursionError) as error:  # from valkey-py's parser
        raise not_valkey(endpoint, error) from error


def _connected(
    config: Config, endpoint: Endpoint, timeout: float, password: str | None, sentinel: bool
) -> Any:
    username = config.address.username if password or not sentinel else None
    options: dict[str, Any] = {
        "db": 0 if sentinel else config.address.db,
        "username": username,
        "password": password,
        "socket_timeout": timeout,
        "socket_connect_timeout": min(_CONNECT_TIMEOUT, timeout),
        # `Connection` sends these with HELLO, in the same round trip.
        "lib_name": None,
        "lib_version": None,
    }
    connection: Any
    if endpoint.path:
        connection = client.UnixDomainSocketConnection(path=endpoint.path, **options)
    else:
        options |= {"host": endpoint.host, "port": endpoint.port}
        kind = functools.partial(_TlsConnection, config) if config.address.tls else _TcpConnection
        connection = kind(**options)
    try:
        connection.connect()
    except BaseException:
        connection.disconnect()
        raise
    return connection


def _password(config: Config) -> str | None:
    """Return the password. Each connection reads the file again, to find a rotated password."""
    path = config.password_file
    if path is None or config.address.password is not None:
        return config.address.password
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        # The error of decoding quotes a part of the password.
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(
            f"password_file {path!r} cannot be read: {reason}",
            "It must be a text file that every node can read",
        ) from None


def _translated(config: Config, endpoint: Endpoint, error: client_errors.ValkeyError) -> Exception:
    """Translate the error that valkey-py failed to connect with into one of this package."""
    if isinstance(error, client_errors.BusyLoadingError):
        return not_now(f"LOADING {error}")
    try:
        reply_error(str(error))
    except (TransientError, TooManyClientsError) as known:
        return known
    if isinstance(error, client_errors.AuthorizationError):
        return _refused(config, endpoint, error)
    if isinstance(error, client_errors.InvalidResponse):
        return not_valkey(endpoint, error)
    if isinstance(error, client_errors.ConnectionError | client_errors.TimeoutError):
        # An error in the first exchange after connecting; a TLS port or a web server causes it too.
        silent = "closed by server" in str(error) or "reading from" in str(error)
        return does_not_answer(error) if silent else ConnectionError(str(error).rstrip("."))
    hint = ""
    if "DB index" in str(error) or "SELECT" in str(error):
        hint = "Give a database that it has; most clusters have only 0"
    return ServerRefusedError(f"{endpoint} refuses the connection: {error}", hint)


def not_valkey(endpoint: Endpoint, error: Exception) -> NotValkeyError:
    return NotValkeyError(
        f"the server at {endpoint} does not speak the Valkey protocol ({error})",
        "Correct url: it must name a Valkey or Redis server",
    )


def does_not_answer(error: Exception) -> ConnectionError:
    return ConnectionError(
        f"it accepts connections, but does not answer as Valkey does: {error}".rstrip(".")
    )


def _refused(
    config: Config, endpoint: Endpoint, error: Exception, sentinel: bool = False
) -> ServerError:
    username = config.address.username
    hint = "Set RAY_VALKEY_SPILL_PASSWORD (or password_file) and username as the server has them"
    if "without any password configured" in str(error):
        hint = "Unset RAY_VALKEY_SPILL_PASSWORD (or password_file), or give the username it is of"
    if sentinel:
        hint = "Give Sentinels no password, or user and password as the servers have them"
    return ServerRefusedError(
        f"{endpoint} refuses {f'user {username!r}' if username else 'the default user'}: {error}",
        hint,
    )
