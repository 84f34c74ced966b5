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
        └── NotValkeyError          something answers there, but not in the Valkey protocol

Error replies are translated in `resp`, what the client library raises in `connection`, failed TLS
handshakes in `tls`, and what a file system raises in `overflow`.
No message ever holds a password.
"""

from __future__ import annotations

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
        what: what is wrong, and with what.
        mend: what the user can do about it, where that is known.
    """

    def __init__(self, what: str, mend: str = "") -> None:
        super().__init__(f"{what.rstrip('.')}. {mend}" if mend else what)
        self.what = what
        self.mend = mend

    def __reduce__(self) -> tuple[type[SpillError], tuple[str, str]]:
        # Ray pickles errors; the default would pass on the joined text as `what`.
        return type(self), (self.what, self.mend)


class ConfigError(SpillError, ValueError):
    """A parameter is wrong; the message names it, what was expected, and the mend."""


class IncompatibleRayError(SpillError, RuntimeError):
    """The installed Ray does not have the functions this package plugs into."""


class LostObjectError(SpillError):
    """A spilled object cannot be had back: its header or a chunk is missing or damaged."""


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
