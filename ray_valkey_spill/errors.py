"""Every error this package raises.

    SpillError
    ├── ConfigError                 a parameter, or a file that it names, is wrong
    ├── IncompatibleRayError        Ray's internals are not the ones this version knows
    ├── LostObjectError             what was spilled is gone or damaged; retrying cannot help
    ├── OverflowUnavailableError    the overflow cannot be used from here; retrying may help
    └── ServerError
        ├── ServerUnavailableError  no answer, broken connection, loading: retrying may help
        │   └── UnconfirmedError    what the server had acknowledged may be lost again
        ├── ServerFullError         the server has no memory left for us (OOM)
        ├── ServerRefusedError      wrong password, missing permission, read-only, forbidden
        │   └── ProtocolError       the form of a request is refused, such as its length
        ├── NotValkeyError          something answers there, but not in the Valkey protocol
        └── RedirectError           another node of the cluster has the key
    TransientError                  another attempt may succeed
    ConnectionError
    ├── TooManyClientsError         the server has as many connections as it allows
    └── ConnectionBrokenError       a connection that had served is closed

Those from RedirectError on are handled in `protocol`; callers of this package do not see them.

Error replies are translated in `resp`, what the client library raises in `dial`, failed TLS
handshakes in `tls`, and what a file system raises in `overflow`.
No message ever holds a password.
"""

from __future__ import annotations

import re

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

    Args:
        message: what is wrong, and with what.
        hint: how the user can fix it, where that is known.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message.rstrip('.')}. {hint}" if hint else message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[SpillError], tuple[str, str]]:
        # Ray pickles errors; the default would pass on the joined text as `message`.
        return type(self), (self.message, self.hint)


class ConfigError(SpillError, ValueError):
    """A parameter is wrong; the message names it, what was expected, and the fix."""


class IncompatibleRayError(SpillError, RuntimeError):
    """The installed Ray does not have the functions this package plugs into."""


class LostObjectError(SpillError):
    """A spilled object cannot be restored: its header or a chunk is missing or damaged."""


class OverflowUnavailableError(SpillError):
    """The overflow cannot be read or written, or is not the one that the other nodes have."""


class ServerError(SpillError):
    """The server could not do what was asked of it."""


class ServerUnavailableError(ServerError):
    """The server cannot be reached or does not serve yet; it was retried for as long as allowed."""


class UnconfirmedError(ServerUnavailableError):
    """A connection broke, and what was acknowledged over it is not there, or not on replicas."""


class ServerFullError(ServerError):
    """The server has no memory for another chunk."""


class ServerRefusedError(ServerError):
    """The server answers, and refuses: authentication, permission, or a read-only replica."""


class NotValkeyError(ServerError):
    """What answers at the address does not speak the Valkey protocol."""


# A proxy may put more behind the address. Host names have labels of 1 to 63 bytes; Python raises
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
    """A connection over which the server had answered is closed."""

    hint = (
        "If that goes on, look for limits below what is sent (client-output-buffer-limit, "
        "maxmemory-clients, or those of a proxy): `ray-valkey-spill check` tries them"
    )


class ProtocolError(ServerRefusedError):
    """The server, or a proxy, refuses the form of what it was sent, and closes the connection."""


class TransientError(Exception):
    """A failure that another attempt may cure.

    Args:
        text: what it was, for the user; it begins with the server's code, if it has one.
        hint: what the user can do if no attempt cures it; empty if that is not known.
    """

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


class RedirectError(ServerError):
    """A node of a cluster says who has the key: from now on, or (`ask`) this once.

    `host` is empty if it is the same as the node's that says so, or if that does not know it.

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
