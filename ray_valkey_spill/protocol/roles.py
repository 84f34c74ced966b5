"""Whether a server reports itself as a primary or a replica."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

from ray_valkey_spill.protocol.resp import Request, command
from ray_valkey_spill.protocol.server_info import fields_of

__all__ = ["HELLO", "INFO", "ROLE", "Question", "Role", "hello_fields", "info_fields"]


class Role(Enum):
    """UNKNOWN: the server, or a proxy in front of it, answers none of the questions."""

    PRIMARY = "primary"
    REPLICA = "replica"
    UNKNOWN = "unknown"


class Question(NamedTuple):
    """A command that asks a server for its role.

    `answer` extracts the role's name from the reply, which is None for an error.
    """

    name: str
    argument: str | None
    answer: Callable[[Any], str]

    def ask(self) -> Request:
        return command(self.name, *([self.argument] if self.argument else []))

    def role(self, reply: Any) -> Role:
        return _ROLES.get(self.answer(reply), Role.UNKNOWN)


def hello_fields(reply: Any) -> dict[str, str]:
    """Return the fields of a reply to HELLO; none if it was an error, as from some proxies."""
    fields = reply if isinstance(reply, list) else []
    return dict(zip(map(_text, fields[::2]), map(_text, fields[1::2])))


def _hello(reply: Any) -> str:
    return hello_fields(reply).get("role", "")


def info_fields(reply: Any) -> dict[str, str]:
    """Return the fields of a reply to INFO; none if it was an error."""
    return fields_of(_text(reply)) if isinstance(reply, bytes | bytearray) else {}


def _info(reply: Any) -> str:
    return info_fields(reply).get("role", "")


def _role(reply: Any) -> str:
    return _text(reply[0]) if isinstance(reply, list) and reply else ""


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes | bytearray) else str(value)


# ROLE and INFO say "slave"; HELLO says "replica".
_ROLES = {
    **dict.fromkeys(("master", "primary"), Role.PRIMARY),
    **dict.fromkeys(("replica", "slave"), Role.REPLICA),
}

# The first answer that names a role counts. HELLO needs no permission, but a proxy or a service may
# not know it.
HELLO = Question("HELLO", "2", _hello)
# Without a section, which not every proxy passes on. The documented user may call it.
INFO = Question("INFO", None, _info)
# For proxies that answer INFO about themselves. The documented user may not call it.
ROLE = Question("ROLE", None, _role)
