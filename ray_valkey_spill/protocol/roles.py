"""Whether a server reports itself as a primary or a replica."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

from ray_valkey_spill.protocol.resp import Request, command
from ray_valkey_spill.protocol.server_info import fields_of

__all__ = ["HELLO", "QUESTIONS", "Question", "Role", "hello_fields"]


class Role(Enum):
    """UNKNOWN: the server, or a proxy in front of it, answers none of `QUESTIONS`."""

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


def _info(reply: Any) -> str:
    is_text = isinstance(reply, bytes | bytearray)
    return fields_of(_text(reply)).get("role", "") if is_text else ""


def _role(reply: Any) -> str:
    return _text(reply[0]) if isinstance(reply, list) and reply else ""


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes | bytearray) else str(value)


# ROLE and INFO say "slave"; HELLO says "replica".
_ROLES = {
    **dict.fromkeys(("master", "primary"), Role.PRIMARY),
    **dict.fromkeys(("replica", "slave"), Role.REPLICA),
}

HELLO = Question("HELLO", "2", _hello)
# The first answer that names a role counts. HELLO needs no permission, and the documented user may
# call INFO. It may not call ROLE, which serves proxies that answer INFO about themselves.
QUESTIONS = (HELLO, Question("INFO", "replication", _info), Question("ROLE", None, _role))
