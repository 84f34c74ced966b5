"""The books on the server: what is stored, what is being written, how much that is, who lives.

What has to change together is changed by a Lua script, so that it does, whatever dies in between;
and each script may be carried out twice with no other effect, as a `Link` may send it twice. They
run on a full server too (`allow-oom`): they write a few bytes where data has many.

    index    sorted set   entries of stored objects                 (see `names`)
    pending  sorted set   names of objects that are being written   (see `names`)
    usage    hash         <session>:<node> → "<objects> <size> <stored> <changes>"; sizes in bytes,
                          and changes counted on from when this began, in µs: none comes twice
    grants   hash         <session>:<node>:<writer> → "<granted> <written>", in bytes
    leases   sorted set   <session>:<node>:<GCS address>, by when it was last renewed, in ms
    overflows  hash       <session> → the token of the overflow that its nodes have

Members and fields that this package cannot have written are skipped: nobody is stopped by what
somebody else left here, and no session or node has a name that leads elsewhere. The first one that
a process finds of each key is logged.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import SpillError
from ray_valkey_spill.format.names import Entry, Keyspace, ObjectName, Owner
from ray_valkey_spill.protocol.link import USUAL_SHARING, Link, Sharing
from ray_valkey_spill.protocol.resp import Request, command
from ray_valkey_spill.tiers import scripts

__all__ = [
    "Grant",
    "Lease",
    "Ledger",
    "Reservation",
    "Usage",
    "link_to",
    "pages",
    "parse_entry",
    "parse_pending",
    "well_formed",
]

logger = logging.getLogger("ray_valkey_spill")

# What one script handles, which nobody else is served meanwhile; and what one reply brings.
_NAMES_PER_SCRIPT = 100
_MEMBERS_PER_PAGE = 500
_RECOUNTS = 5

# Names of sessions and nodes become paths in the overflow, which a clean-up removes.
_OWNER = re.compile("([A-Za-z0-9_-]+):([A-Za-z0-9_-]+)")
_LEASE = re.compile(f"{_OWNER.pattern}:([!-~]*)")
_WRITER = re.compile(f"{_OWNER.pattern}:.+")
_SESSION = re.compile("[A-Za-z0-9_-]+")
_TOKEN = re.compile("[ -.0-~]+")  # part of a file's name
_USAGE = re.compile(rb"(\d+) (\d+) (\d+) (\d+)")
_GRANT = re.compile(rb"(\d+) (\d+)")

# The keys of which this process has logged that they have something malformed.
_logged: set[str] = set()

_F = TypeVar("_F", bytes, tuple[bytes, bytes])
_K = TypeVar("_K")
_T = TypeVar("_T")


class Usage(NamedTuple):
    """What an owner has in Valkey: how many objects, their data, and what that takes, in bytes."""

    objects: int = 0
    size: int = 0
    stored: int = 0
    changes: int = 0


class Grant(NamedTuple):
    """What a writer may write, and has written of that, in bytes."""

    granted: int
    written: int


class Reservation(NamedTuple):
    """What a writer was granted on top, in bytes.

    Attributes:
        granted: 0 if there was not as much as it wanted at least.
        used: what of the budget was used before.
        unwritten: what all writers may still write, with what was granted now.
    """

    granted: int
    used: int
    unwritten: int


class Lease(NamedTuple):
    """That a node of a session lived at `renewed`: ms, by the server's clock."""

    owner: Owner
    gcs_address: str
    renewed: int


def link_to(
    config: Config,
    *,
    unreachable_timeout: float | None = None,
    waiting: Callable[[SpillError], None] = lambda error: None,
    any_role: bool = False,
    sharing: Sharing = USUAL_SHARING,
    spare: Callable[[], None] = lambda: None,
) -> Link:
    """Client for the configured server, cluster or Sentinel group.

    Requests without a key are sent to the server that has the metadata. For options see `Link`.
    """
    home = Keyspace.of(config).index.encode()
    return Link(
        config,
        home,
        unreachable_timeout=unreachable_timeout,
        waiting=waiting,
        any_role=any_role,
        sharing=sharing,
        spare=spare,
    )


class Ledger:
    """Reads and writes the books, over a link. Errors are those of `link.Link.run`.

    What goes together with data is returned as requests, to be sent with them.
    """

    def __init__(self, link: Link, keyspace: Keyspace) -> None:
        self._link = link
        self._keys = keyspace

    # --- requests ---

    def registrations(self, names: Iterable[ObjectName]) -> Iterator[Request]:
        """Enter objects as pending. Nothing of them may be written before."""
        for page in pages(map(str, names), _MEMBERS_PER_PAGE):
            scored = [field for member in page for field in (0, member)]
            yield command("ZADD", self._keys.pending, *scored)

    def settlements(self, owner: Owner, entries: Iterable[Entry]) -> Iterator[Request]:
        """Enter objects as stored. The sum of the replies tells how many are.

        Those are missing that were not pending: their owner's data were destroyed meanwhile, or the
        server lost them.
        """
        for page in pages(entries, _NAMES_PER_SCRIPT):
            told = [a for e in page for a in (str(e.name), f".{e.size}.{e.stored}")]
            yield self._eval(scripts.SETTLE, self._books, str(owner), *told)

    def forget(self, names: Iterable[ObjectName]) -> Iterator[Request]:
        """Take objects out of the books; what is not in them is no error."""
        for page in pages(names, _NAMES_PER_SCRIPT):
            yield self._eval(scripts.FORGET, self._books, *map(str, page))

    @property
    def _books(self) -> list[str]:
        return [self._keys.pending, self._keys.index, self._keys.usage]

    def _eval(self, script: str, keys: Sequence[str], *args: str | bytes | int) -> Request:
        return command("EVAL", script, len(keys), *keys, *args)

    # --- what there is ---

    def stored(self, owner: Owner | None = None) -> Iterator[list[Entry]]:
        """The objects of a node of a session, or all there are, in order, by the page."""
        key = self._keys.index
        start: str | bytes
        start, stop = ("-", "+") if owner is None else _range(str(owner))
        while True:
            (members,) = self._link.execute(
                command("ZRANGEBYLEX", key, start, stop, "LIMIT", 0, _MEMBERS_PER_PAGE)
            )
            if not members:
                return
            yield list(well_formed(key, members, parse_entry))
            start = b"(" + members[-1]

    def pending(self, owner: Owner) -> Iterator[list[ObjectName]]:
        """What is being written, or was when its writer was killed, by the page."""
        start: str | bytes
        start, stop = _range(str(owner))
        while True:
            request = self._eval(scripts.PENDING, self._books[:2], start, stop, _MEMBERS_PER_PAGE)
            ((last, members),) = self._link.execute(request)
            if not last:
                return
            yield list(well_formed(self._keys.pending, members, parse_pending))
            start = b"(" + last

    def owners(self) -> set[Owner]:
        """Everybody who is in any book, found by hopping from one to the next."""
        usages = self.usages()
        writers = [writer.encode() for writer in self.grants()]
        grants = well_formed(self._keys.grants, writers, _owner_of_writer)
        leases = {lease.owner for lease in self.leases()}
        stored = self._hop(self._keys.index, lambda member: parse_entry(member).name)
        return {*usages, *grants, *leases, *stored, *self._hop(self._keys.pending, parse_pending)}

    def _hop(self, key: str, parse: Callable[[bytes], ObjectName]) -> Iterator[Owner]:
        start: str | bytes = "-"
        while True:
            (members,) = self._link.execute(command("ZRANGEBYLEX", key, start, "+", "LIMIT", 0, 1))
            if not members:
                return
            start = b"(" + members[0]
            for name in well_formed(key, members, parse):
                owner = Owner(name.session, name.node)
                yield owner
                start = f"[{owner};"  # ";" comes right after ":"

    # --- usage ---

    def usages(self) -> dict[Owner, Usage]:
        return dict(
            self._fields(self._keys.usage, lambda field, value: (_owner(field), _usage(value)))
        )

    def recount(self, owner: Owner) -> bool:
        """Correct an owner's usage by what the index has; returns False if it changes too fast."""
        for _ in range(_RECOUNTS):
            (was,) = self._link.execute(command("HGET", self._keys.usage, str(owner)))
            objects = size = stored = 0
            for page in self.stored(owner):
                objects += len(page)
                size += sum(entry.size for entry in page)
                stored += sum(entry.stored for entry in page)
            if was is None:
                if not objects:
                    return True
                # Counted anew: that something came and went meanwhile would not show in nothing.
                self._correct(owner, b"", Usage(changes=_now()))
                continue
            known = next(well_formed(self._keys.usage, [was], _usage), None)
            if objects and known is not None and known[:3] == (objects, size, stored):
                return True
            changes = _now() if known is None else known.changes + 1
            counted = Usage(objects, size, stored, changes) if objects else None
            if self._correct(owner, bytes(was), counted):
                return True
        return False

    def _correct(self, owner: Owner, was: bytes, usage: Usage | None) -> bool:
        """Replace an owner's usage, if it still is what it was; returns whether."""
        text = "" if usage is None else " ".join(map(str, usage))
        request = self._eval(scripts.CORRECT, [self._keys.usage], str(owner), was, text)
        return self._link.execute(request) == [1]

    # --- grants ---

    def reserve(
        self, writer: str, grant: Grant, least: int, most: int, budget: int | None, room: int | None
    ) -> Reservation:
        """Grant a writer `least` to `most` bytes on top of `grant`.

        Args:
            writer: who.
            grant: what it has been granted, and has written of that.
            least: bytes.
            most: bytes.
            budget: what all may have stored, in bytes; None for no bound.
            room: what the server has room for beside what is on it, in bytes; None for no bound.
        """
        limits = [-1 if limit is None else limit for limit in (budget, room)]
        keys = [self._keys.usage, self._keys.grants]
        request = self._eval(scripts.RESERVE, keys, writer, *grant, least, most, *limits)
        (reply,) = self._link.execute(request)
        return Reservation(*reply)

    def release(self, writers: Sequence[str | bytes]) -> None:
        if writers:
            self._link.execute(command("HDEL", self._keys.grants, *writers))

    def release_all(self, owner: Owner) -> None:
        """Release the grants of all writers of a node."""
        (found,) = self._link.execute(command("HGETALL", self._keys.grants))
        prefix = f"{owner}:".encode()
        self.release([bytes(writer) for writer in found[::2] if writer.startswith(prefix)])

    def grants(self) -> dict[str, Grant]:
        """By writer: `<session>:<node>:<process>…`."""
        return dict(
            self._fields(self._keys.grants, lambda field, value: (field.decode(), _grant(value)))
        )

    # --- leases ---

    def renew(self, owner: Owner, gcs_address: str, *, new: bool) -> bool:
        """Note that `owner` lives; without `new` only if that has been noted before."""
        request = self._eval(
            scripts.RENEW, [self._keys.leases], f"{owner}:{gcs_address}", "1" if new else "0"
        )
        return self._link.execute(request) == [1]

    def leases(self) -> list[Lease]:
        (found,) = self._link.execute(command("ZRANGE", self._keys.leases, 0, -1, "WITHSCORES"))
        pairs = zip(found[::2], found[1::2])
        return list(well_formed(self._keys.leases, pairs, lambda pair: _lease(*pair)))

    def close_account(self, owner: Owner) -> None:
        """Forget everything of an owner that has nothing stored any more."""
        members = [f"{o}:{address}" for o, address, _ in self.leases() if o == owner]
        if members:
            self._link.execute(command("ZREM", self._keys.leases, *members))
        self.release_all(owner)
        self.recount(owner)

    def time(self) -> int:
        """The server's clock, in ms."""
        ((seconds, microseconds),) = self._link.execute(command("TIME"))
        return int(seconds) * 1000 + int(microseconds) // 1000

    # --- overflows ---

    def agree_on_overflow(self, session: str, proposed: str) -> str:
        """The token of the overflow that a session has; `proposed`, if it had none."""
        (found,) = self._link.execute(
            self._eval(scripts.AGREE, [self._keys.overflows], session, proposed)
        )
        return str(found.decode())

    def overflows(self) -> dict[str, str]:
        """The tokens, by session."""
        return dict(
            self._fields(
                self._keys.overflows,
                lambda field, value: (
                    _matched(_SESSION, field)[0],
                    _matched(_TOKEN, value)[0],
                ),
            )
        )

    def forget_overflow(self, session: str) -> bool:
        """Forget which overflow a session has, unless a node of it lives; returns whether."""
        keys = [self._keys.overflows, self._keys.leases]
        request = self._eval(scripts.FORGET_OVERFLOW, keys, session, f"{session}:")
        return self._link.execute(request) == [1]

    def _fields(
        self, key: str, parse: Callable[[bytes, bytes], tuple[_K, _T]]
    ) -> Iterator[tuple[_K, _T]]:
        (found,) = self._link.execute(command("HGETALL", key))
        return well_formed(key, zip(found[::2], found[1::2]), lambda pair: parse(*pair))


def well_formed(key: str, found: Iterable[_F], parse: Callable[[_F], _T]) -> Iterator[_T]:
    """Yield what `parse` returns for what was `found` at `key`, skipping what is malformed.

    Args:
        key: named in the log, once in this process.
        found: members, or pairs of fields and values.
        parse: raises ValueError for what is malformed.
    """
    for each in found:
        try:
            parsed = parse(each)
        except (ValueError, OverflowError):
            if key not in _logged:
                _logged.add(key)
                pieces = each if isinstance(each, tuple) else (each,)
                logger.warning(
                    "%s has malformed content, which is skipped, for example %.200s. Another "
                    "program may write below this prefix: give each its own key_prefix, and delete "
                    "what is malformed",
                    key,
                    " ".join(repr(bytes(piece)) for piece in pieces),
                )
            continue
        yield parsed


def parse_entry(member: bytes) -> Entry:
    """A member of the index. Raises ValueError if it is none."""
    entry = Entry.parse(member.decode())
    _matched(_OWNER, f"{entry.name.session}:{entry.name.node}".encode())
    return entry


def parse_pending(member: bytes) -> ObjectName:
    """A member of the pending set. Raises ValueError if it is none."""
    name = ObjectName.parse(member.decode())
    _matched(_OWNER, f"{name.session}:{name.node}".encode())
    return name


def pages(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    source = iter(items)
    while page := list(islice(source, size)):
        yield page


def _range(prefix: str) -> tuple[str, str]:
    """The bounds of all members that begin with `prefix` and ":"; ";" comes right after that."""
    return f"[{prefix}:", f"({prefix};"


def _matched(pattern: re.Pattern[str], text: bytes) -> re.Match[str]:
    match = pattern.fullmatch(text.decode())
    if match is None:
        raise ValueError
    return match


def _owner(field: bytes) -> Owner:
    return Owner(*_matched(_OWNER, field).groups())


def _owner_of_writer(writer: bytes) -> Owner:
    return Owner(*_matched(_WRITER, writer).groups())


def _lease(member: bytes, score: bytes) -> Lease:
    session, node, gcs_address = _matched(_LEASE, member).groups()
    return Lease(Owner(session, node), gcs_address, int(float(score)))


def _usage(value: bytes) -> Usage:
    return Usage(*_numbers(_USAGE, value))


def _grant(value: bytes) -> Grant:
    return Grant(*_numbers(_GRANT, value))


def _numbers(pattern: re.Pattern[bytes], value: bytes) -> Iterator[int]:
    match = pattern.fullmatch(value)
    if match is None:
        raise ValueError
    return map(int, match.groups())


def _now() -> int:
    """Microseconds since the epoch, by the clock of this process."""
    return time.time_ns() // 1000
