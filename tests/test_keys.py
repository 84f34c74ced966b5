from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import LostObjectError
from ray_valkey_spill.format.names import Entry, Keyspace, ObjectName, Place, TierName, new_attempt

NAME = ObjectName("session_2026-01-02_03-04-05_6_7", "ab" * 28, "cd" * 28, "0" * 27, 3)
KEYS = Keyspace("ray:spill:default:")

component = st.text("abcdefXYZ0189_-", min_size=1, max_size=20)
names = st.builds(
    ObjectName, component, component, component, st.from_regex("[0-9a-f]{27}", fullmatch=True),
    st.integers(0, 10**6),
)  # fmt: skip


def test_every_key_lies_below_prefix_and_namespace() -> None:
    keys = Keyspace.of(Config.load({"key_prefix": "ray:x:", "namespace": "n"}, {}))
    for key in (keys.index, keys.pending, keys.usage, keys.grants, keys.leases, keys.overflows):
        assert key.startswith("ray:x:n:")
    for key in (keys.header(NAME), *keys.chunks(NAME)):
        assert key.startswith("ray:x:n:")


def test_keys_tell_session_node_and_object() -> None:
    header = KEYS.header(NAME)
    assert NAME.session in header
    assert NAME.node in header
    assert NAME.object_id in header
    assert KEYS.chunks(NAME) == [f"{header}:0", f"{header}:1", f"{header}:2"]


@given(
    names,
    st.integers(0, 2**63),
    st.sampled_from(["valkey", "overflow"]),
    st.none() | st.integers(0, 2**64 - 1),
)
def test_a_url_is_read_back_as_it_was_written(
    name: ObjectName, size: int, tier: TierName, key_id: int | None
) -> None:
    place = Place(name, size, tier, key_id)
    url = KEYS.url(place)
    assert KEYS.parse_url(url) == place
    # The raylet splits at the first "?", takes tokens with "=" apart, and chokes on the rest.
    base, query = url.split("?")
    assert not set("?&#") & set(base)
    assert all(token.count("=") == 1 for token in query.split("&"))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ray:spill:default:",
        "ray:spill:default:{default}:index",
        KEYS.header(NAME),
        f"{KEYS.header(NAME)}?size=3&offset=0",
        f"{KEYS.header(NAME)}?offset=7&size=3",
        f"{KEYS.header(NAME)}?offset=0&size=-3",
        f"{KEYS.header(NAME)}?offset=0&size=3&sealed=ab",
        f"{KEYS.header(NAME)}:0?offset=0&size=3",
        f"tape:{KEYS.header(NAME)}?offset=0&size=3",
        "ray:spill:other:s:n:o.0.1?offset=0&size=3",
        "/tmp/file?offset=0&size=3",
        "session:user:123?offset=0&size=3",
    ],
)
def test_a_url_of_anybody_else_is_not_taken_for_ours(url: str) -> None:
    with pytest.raises(LostObjectError):
        KEYS.parse_url(url)


@given(names, st.integers(0, 2**63), st.integers(0, 2**63))
def test_an_entry_is_read_back_as_it_was_written(name: ObjectName, size: int, stored: int) -> None:
    entry = Entry(name, size, stored)
    assert Entry.parse(str(entry)) == entry


@pytest.mark.parametrize("text", ["", str(NAME), f"{NAME}.1", f"{NAME}.1.x", "a.1.2"])
def test_what_is_no_entry_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="not"):
        Entry.parse(text)


def test_attempts_differ_sort_by_time_and_tell_their_writer() -> None:
    attempts = [new_attempt() for _ in range(1000)]
    assert len(set(attempts)) == 1000
    assert [a[:11] for a in attempts] == sorted(a[:11] for a in attempts)
    assert NAME._replace(attempt=attempts[0]).writer == os.getpid()
