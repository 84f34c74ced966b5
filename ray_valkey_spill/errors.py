"""Every error this package raises.

    SpillError
    ├── ConfigError                 a parameter, or a file that it names, is wrong
    ├── IncompatibleRayError        Ray's internals are not those that this version knows
    ├── LostObjectError             a spilled object is gone or damaged; retrying cannot help
    ├── OverflowUnavailableError    the overflow cannot be used from here; retrying may help
    └── ServerError
        ├── ServerUnavailableError  no answer, broken connection, loading: retrying may help
        │   └── UnconfirmedError    the server may have lost what it had acknowledged
        ├── ServerFullError         the server has no memory left (OOM)
        ├── ServerRefusedError      wrong password, missing permission, read-only, forbidden
        │   └── ProtocolError       the form of a request is refused, such as its length
        ├── NotValkeyError          what answers there does not speak the Valkey protocol
        └── RedirectError           another node of the cluster has the key
    TransientError                  another attempt may succeed
    ConnectionError
    ├── TooManyClientsError         the server has as many connections as it allows
    ├── ConnectionBrokenError       a connection that had worked is closed
    └── ClosedAtHelloError          a new connection is closed as it says HELLO

`protocol` handles RedirectError and all below it; callers of this package do not see them.

`resp` translates error replies, `dial` the errors of the client library, `tls` failed handshakes,
and `overflow` the errors of file systems. No message contains a password.
"""

from __future__ import annotations

import re

from ray_valkey_spill.units import escaped

__all__ = [
    "ConfigError",
    "IncompatibleRayError",
    "LostObjectError",
    "NotValkeyError",
    "OverflowUnavailableError",
    "ServerError",
    "ServerFullError",
    "ServerRefusedError",
    "ServerUnavailableError",
    "SpillError",
    "UnconfirmedError",
]


class SpillError(Exception):
    """Base of every error of this package.

    Messages go to terminals and logs, and may quote a server, a path or a parameter. So control
    characters in them are escaped, except for line breaks.

    Args:
        message: names the thing and what is wrong with it.
        hint: the fix, if it is known.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        message = escaped(message)
        text = message.rstrip(".")
        end = "" if text.endswith("?") else "."
        super().__init__(f"{text}{end} {hint}" if hint else message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[SpillError], tuple[str, str]]:
        # Ray pickles errors; the default would pass the joined text as `message`.
        return type(self), (self.message, self.hint)


class ConfigError(SpillError, ValueError):
    """A parameter is wrong; the message names it, describes a valid value, and has the fix."""


class IncompatibleRayError(SpillError, RuntimeError):
    """The installed Ray lacks functions that this package replaces or calls."""


class LostObjectError(SpillError):
    """A spilled object cannot be restored: its header or a chunk is missing or damaged."""


class OverflowUnavailableError(SpillError):
    """The overflow cannot be read or written, or other nodes use another one."""


class ServerError(SpillError):
    """The server could not carry out a request."""


class ServerUnavailableError(ServerError):
    """The server cannot be reached or does not serve yet; retries have ended."""


class UnconfirmedError(ServerUnavailableError):
    """A connection broke, and what was acknowledged over it is missing, or not on replicas."""


class ServerFullError(ServerError):
    """The server has no memory for another chunk."""


class ServerRefusedError(ServerError):
    """The server refuses: authentication, permission, or a read-only replica."""


class MissingCommandError(ServerError):
    """The server does not know a command."""


class NotValkeyError(ServerError):
    """What answers at the address does not speak the Valkey protocol."""


# A proxy may append more to the address. Host names have labels of 1 to 63 bytes; Python raises
# UnicodeError for others.
_REDIRECT = re.compile(
    r"(?P<code>MOVED|ASK) [0-9]+ "
    r"(?P<host>\??|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[!-~]+)?|[\w-]{1,63}(\.[\w-]{1,63})*\.?)"
    r":(?P<port>[0-9]{1,5})( |$)",
    re.ASCII,
)
_LARGEST_PORT = 65535


class TooManyClientsError(ConnectionError):
    """The server has as many connections as its `maxclients` allows."""

    hint = "Raise its maxclients: docs/operations.md has the number that a node needs"


class ConnectionBrokenError(ConnectionError):
    """A connection over which the server had answered was closed."""

    hint = (
        "If that continues, look for limits that are too small for chunks "
        "(client-output-buffer-limit, maxmemory-clients, or those of a proxy): "
        "`ray-valkey-spill check` tries them"
    )


class ClosedAtHelloError(ConnectionError):
    """A new connection was closed instead of an answer to its first commands.

    The server may have stopped just then, or a proxy closes what sends a command it does not know.
    """


class ProtocolError(ServerRefusedError):
    """The server, or a proxy, refuses the form of a request, and closes the connection."""


class TransientError(Exception):
    """A failure after which another attempt may succeed.

    Args:
        text: describes it to the user; it begins with the server's error code, if there is one.
        hint: the fix if every attempt fails; empty if it is not known.
    """

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


class RedirectError(ServerError):
    """A node of a cluster names the node that has the key: from now on, or (`ask`) this once.

    `host` is empty if it is the host of the node that answered, or if that node does not know it.

    Raises:
        NotValkeyError: `text` is not `MOVED <slot> <host>:<port>`, or the same with ASK.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        match = _REDIRECT.match(text)
        port = int(match["port"]) if match else 0
        if match is None or not 0 < port <= _LARGEST_PORT:
            raise NotValkeyError(f"a reply redirects to no address: {text[:80]!r}")
        self.ask = match["code"] == "ASK"
        self.host = "" if match["host"] == "?" else match["host"]
        self.port = port
