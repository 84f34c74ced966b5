"""The Valkey protocol (RESP2) on a socket: sends commands from buffers, reads replies into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray_valkey_spill.errors import (
    MissingCommandError,
    NotValkeyError,
    ProtocolError,
    RedirectError,
    ServerError,
    ServerFullError,
    ServerRefusedError,
    TooManyClientsError,
    TransientError,
)
from ray_valkey_spill.units import Buffer

__all__ = [
    "Prepared",
    "ReplyReader",
    "Request",
    "command",
    "fetch",
    "not_now",
    "reply_error",
    "store",
]

# Bytes; the part of a value that arrives with its first line is copied, so this limits the copy.
_READ_SIZE = 8 << 10
_LARGEST = 512 << 20
_LARGEST_INTEGER = 2**63
_LONGEST_INTEGER = len(b"-9223372036854775808")
# Arrays in arrays. CLUSTER SLOTS has the deepest of all replies, with three.
_DEEPEST = 8

_USE_PRIMARY = "Wait for the failover to end, or give the url of the primary"
# Error replies that mean "not now", with a hint for those that may not pass by themselves. A server
# that restarts, fails over or reshards sends them. The table omits codes of commands that this
# package never sends (UNKILLABLE, INPROG, NOGOODSLAVE, NOMASTERLINK, IOERR), and MISCONF, which
# lasts until an operator fixes the disk.
_NOT_NOW = {
    "LOADING": "Wait until it has loaded its data, or raise retry_timeout",
    "BUSY": "Wait until the script or module command that it runs has ended",
    "CLUSTERDOWN": "Bring its failed nodes back, or assign their slots to others (CLUSTER INFO)",
    "TRYAGAIN": "",
    "NOREPLICAS": "Bring its replicas back, or lower min-replicas-to-write",
    "MASTERDOWN": _USE_PRIMARY,
    "READONLY": _USE_PRIMARY,
    # Replaces READONLY for clients that asked for it, as a proxy may do.
    "REDIRECT": _USE_PRIMARY,
    # From a primary that became a replica during a WAIT.
    "UNBLOCKED": "",
}
# Its reply to WAIT and WAITAOF from then on.
_NO_PRIMARY = "cannot be used with replica instances"
# In a cluster the text continues with "+ cluster connections".
_TOO_MANY_CLIENTS = "max number of clients"

_HINT_LENGTH = (
    "A chunk exceeds the server's limit: raise its proto-max-bulk-len, or lower chunk_size "
    "(`ray-valkey-spill check` finds how far)"
)

# The replies of Valkey and of Redis to a script that does what its user may not do.
_REFUSED_IN_A_SCRIPT = ("ACL failure in script", "The user executing the script can't")


def not_now(text: str) -> TransientError:
    """Return the error for `text`, which begins with one of the codes that mean "not now"."""
    return TransientError(text, _NOT_NOW.get(text.partition(" ")[0], ""))


# --- requests ---

# Commands without a key. The first argument of all others is a key, except for EVAL.
_KEYLESS = {
    *(b"ASKING", b"CLIENT", b"CLUSTER", b"HELLO", b"INFO", b"PING", b"ROLE", b"SENTINEL"),
    *(b"TIME", b"WAIT", b"WAITAOF"),
}


class Request:
    """A command, and its reply once it has arrived. It must be safe to repeat (see `link`).

    Attributes:
        parts: the encoded command.
        key: one of its keys, which in a cluster all have the same slot; None if it has no key.
        fenced: whether the server may execute it only after all requests before it.
        guarded: whether the link sends it only once all requests before it have succeeded.
        urgent: whether it is sent at once, and not together with those that follow.
        target: the server to send it to, for a command without a key.
        connection: the connection that it was given to.
        redirects: number of times it was redirected to another node of a cluster.
        done: whether the reply has arrived.
        into: buffer for the reply's value, which is used if the value has exactly its size.
        most: bytes of the longest value that is kept. A longer one, which another program has put
            there, is received and dropped, and the reply is empty.
        reply: the reply: bytes for a status, bytearray for a value, int, list or None. The value's
            length if it was received into `into`.
        error: the server's error instead of a reply.
        length: bytes of the command.
        weight: bytes that it has under way: the command's, and the `expected` ones of the reply.
    """

    __slots__ = (
        *("connection", "done", "error", "fenced", "guarded", "into", "key", "length", "most"),
        *("parts", "redirects", "reply", "target", "urgent", "weight"),
    )

    def __init__(
        self,
        parts: list[Buffer],
        key: bytes | None,
        *,
        into: memoryview | None = None,
        expected: int = 0,
        most: int = _LARGEST,
    ) -> None:
        self.parts = parts
        self.key = key
        self.fenced = self.guarded = self.urgent = self.done = False
        self.redirects = 0
        self.target: Any = None
        self.connection: Any = None
        self.into = into
        self.most = most
        self.reply: Any = None
        self.error: ServerError | None = None
        self.length = sum(map(len, parts))
        self.weight = self.length + (expected if into is None else len(into))

    @property
    def is_received(self) -> bool:
        """Whether the reply is expected to be longer than the command."""
        return self.weight > 2 * self.length

    def result(self) -> Any:
        """Return the reply. Raises the server's error, translated."""
        if self.error is not None:
            raise self.error
        return self.reply

    def integers(self, count: int | None = None) -> list[int]:
        """Return a reply of `count` integers, or of one that is no array. Errors as `result`.

        Raises:
            NotValkeyError: the reply is something else.
        """
        reply = self.result()
        found = [reply] if count is None else reply
        is_list = isinstance(found, list) and len(found) == (count or 1)
        if is_list and all(isinstance(each, int) for each in found):
            return list(found)
        raise self._unexpected()

    def value(self) -> bytearray | None:
        """Return a value, or None if there is none. Errors as `result`.

        Raises:
            NotValkeyError: the reply is something else.
        """
        reply = self.result()
        if reply is None or isinstance(reply, bytearray):
            return reply
        raise self._unexpected()

    def _unexpected(self) -> NotValkeyError:
        name = bytes(self.parts[0]).split(b"\r\n", 3)[2].decode(errors="replace")
        return NotValkeyError(f"{name} has the reply {str(self.reply)[:40]!r}: this is not Valkey")


class Prepared:
    """A command with constant first arguments, which are encoded once.

    EVAL must have at least one key, and all its keys must be in one slot.

    Args:
        name: of the command.
        args: its first arguments.
        key: one that the command uses, if its first arguments do not have it.
    """

    __slots__ = ("_count", "_encoded", "_key")

    def __init__(self, name: str, *args: str | bytes | int, key: str | None = None) -> None:
        encoded = _encoded((name, *args))
        self._key = _key_of(encoded) if key is None else key.encode()
        self._count = len(encoded)
        self._encoded = b"".join(_bulks(encoded))

    def request(self, *args: str | bytes | int) -> Request:
        """Return the command with further arguments."""
        head = b"*%d\r\n" % (self._count + len(args))
        return Request([b"".join((head, self._encoded, *_bulks(args)))], self._key)


def command(name: str, *args: str | bytes | int) -> Request:
    """Return a small command. EVAL as for `Prepared`."""
    encoded = _encoded((name, *args))
    return Request([b"".join((b"*%d\r\n" % len(encoded), *_bulks(encoded)))], _key_of(encoded))


def _encoded(args: Sequence[str | bytes | int]) -> list[bytes]:
    return [a if isinstance(a, bytes) else str(a).encode() for a in args]


def _bulks(args: Sequence[str | bytes | int]) -> list[bytes]:
    return [b"$%d\r\n%b\r\n" % (len(a), a) for a in _encoded(args)]


def _key_of(encoded: Sequence[bytes]) -> bytes | None:
    """Return the first key of a command."""
    name, place = encoded[0], 3 if encoded[0] == b"EVAL" else 1
    return None if name in _KEYLESS or place >= len(encoded) else encoded[place]


def store(key: str, value: Sequence[Buffer]) -> Request:
    """Return a SET of `key` to the concatenation of `value`'s buffers, without copying them."""
    name = key.encode()
    size = sum(map(len, value))
    head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, size)
    return Request([head, *value, b"\r\n"], name)


def fetch(
    key: str, *, into: memoryview | None = None, expected: int = 0, most: int = _LARGEST
) -> Request:
    """Return a GET of `key`.

    If the value has exactly the size of `into`, it is received there, and the reply is its length.
    Without `into`, `expected` is the approximate length of the value in bytes, and `most` as for
    `Request`.
    """
    name = key.encode()
    parts: list[Buffer] = [b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name)]
    longest = most if into is None else len(into)
    return Request(parts, name, into=into, expected=expected, most=longest)


# --- replies ---


class ReplyReader:
    """Parses RESP2 replies from a socket, and receives values in place where it can."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._bytes = bytearray(_READ_SIZE)
        self._buffer = memoryview(self._bytes)
        self._start = self._end = 0  # bounds of the bytes received but not yet parsed

    def read(self, request: Request) -> None:
        """Receive the next reply, and set the request's `reply` or `error`.

        Raises:
            OSError: the connection broke or stalled, or the server has too many clients.
            TransientError: the reply means "not now".
            ProtocolError: the server refused the form of a request, and closes the connection.
            NotValkeyError: the bytes are not a reply.
        """
        reply = self._parse(request.into, request.most)
        if isinstance(reply, ServerError):
            request.error = reply
        else:
            request.reply = reply

    def _parse(self, into: memoryview | None = None, most: int = _LARGEST, depth: int = 0) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            return None if rest == b"-1" else self._bulk(_number(rest, least=0), into, most)
        if kind == b":":
            return _number(rest, least=-_LARGEST_INTEGER, most=_LARGEST_INTEGER)
        if kind == b"+":
            return rest
        if kind == b"-":
            return reply_error(rest.decode(errors="replace"))
        if kind == b"*":
            return None if rest == b"-1" else self._array(_number(rest, least=0), depth)
        shown = line[:20].decode(errors="backslashreplace")
        raise NotValkeyError(f'a reply begins with "{shown}": this is not Valkey')

    def _array(self, count: int, depth: int) -> list[Any]:
        if depth == _DEEPEST:
            raise NotValkeyError("a reply has arrays in arrays: this is not Valkey")
        return [self._parse(depth=depth + 1) for _ in range(count)]

    def _bulk(self, size: int, into: memoryview | None, most: int) -> Any:
        if size > most:
            self._skip(size + 2)
            return bytearray()
        target = into if into is not None and len(into) == size else memoryview(bytearray(size))
        got = min(size, self._end - self._start)
        target[:got] = self._buffer[self._start : self._start + got]
        self._start += got
        while got < size:
            # Receive the value in place, and what follows it into the buffer.
            count = self._receive([target[got:], self._buffer])
            self._start, self._end = 0, max(0, count - (size - got))
            got = min(size, got + count)
        while self._end - self._start < 2:
            self._fill()
        self._start += 2
        return size if target is into else target.obj

    def _skip(self, size: int) -> None:
        """Receive bytes and drop them."""
        while size > self._end - self._start:
            size -= self._end - self._start
            self._start, self._end = 0, self._receive([self._buffer])
        self._start += size

    def _line(self) -> bytes:
        while True:
            # First lines are short; those of errors are the longest.
            end = self._bytes.find(b"\r\n", self._start, self._end)
            if end >= 0:
                line = bytes(self._buffer[self._start : end])
                self._start = end + 2
                return line
            self._fill()

    def _fill(self) -> None:
        """Receive more bytes, and append them to those not yet parsed."""
        left = self._end - self._start
        if self._end == len(self._buffer) or not left:
            if left == len(self._buffer):
                raise NotValkeyError("a reply's first line has no end")
            self._buffer[:left] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, left
        self._end += self._receive([self._buffer[self._end :]])

    def _receive(self, buffers: list[memoryview]) -> int:
        try:
            count: int = self._sock.recvmsg_into(buffers)[0]
        except BlockingIOError:
            raise TimeoutError("it does not reply") from None
        if not count:
            raise ConnectionResetError("the server closed the connection")
        return count


def _number(text: bytes, least: int, most: int = _LARGEST) -> int:
    """Parse an integer reply, or a length, which is at most 512 MiB (`proto-max-bulk-len`)."""
    is_integer = text.isdigit() or (text[:1] == b"-" and text[1:].isdigit())
    if is_integer and len(text) <= _LONGEST_INTEGER and least <= (number := int(text)) <= most:
        return number
    raise NotValkeyError(f"a reply has {text[:20]!r} for a number: this is not Valkey")


def reply_error(text: str) -> ServerError:
    """Return the error for an error reply.

    Raises:
        TransientError: the reply means "not now".
        TooManyClientsError: the server has as many clients as it allows.
        ProtocolError: the server closes the connection after this reply.
        NotValkeyError: the reply redirects to no valid address.
    """
    code = text.partition(" ")[0]
    if code in _NOT_NOW or _NO_PRIMARY in text:
        raise not_now(text)
    if _TOO_MANY_CLIENTS in text:
        raise TooManyClientsError(text.removeprefix("ERR "))
    if "Protocol error" in text and "unauthenticated" not in text:
        raise ProtocolError(text, _HINT_LENGTH if "bulk length" in text else "")
    if code in ("MOVED", "ASK"):
        return RedirectError(text)
    if code == "OOM":
        return ServerFullError(text, "Raise the server's maxmemory, or remove other data from it")
    if code == "WRONGTYPE":
        return ServerError(
            text,
            "Another program writes below this key_prefix: give each its own, and delete the keys "
            "of another type (`TYPE` shows it)",
        )
    if code == "MISCONF":
        return ServerError(text, "Fix its disk: the server's log has the reason")
    if code in ("NOAUTH", "WRONGPASS") or "Protocol error" in text:
        return ServerRefusedError(
            text, "Set RAY_VALKEY_SPILL_PASSWORD (or password_file) and username as the server has"
        )
    if code in ("NOPERM", "DENIED"):
        return ServerRefusedError(text, "`ray-valkey-spill check` lists what the user may not do")
    if code == "ERR" and any(phrase in text for phrase in _REFUSED_IN_A_SCRIPT):
        return ServerRefusedError(text, "`ray-valkey-spill check` lists what the user may not do")
    if text.startswith("ERR unknown command"):
        # What follows quotes the command's arguments, such as a script.
        text, _, _ = text.partition(", with args")
        return MissingCommandError(text, "`ray-valkey-spill check` lists what the server lacks")
    return ServerError(text)
