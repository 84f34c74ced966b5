"""Sealed data: whatever is done to what is stored, readers get what was put, or are told."""

from __future__ import annotations

import base64
import hmac
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from click.testing import CliRunner
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ray.exceptions import ObjectLostError
from support.clusters import MIB, local_ray, spill, title
from support.samples import noise
from support.servers import PATIENCE, Server, wait_until
from support.stores import Store

from ray_valkey_spill.cli import commands
from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import ConfigError, LostObjectError, SpillError
from ray_valkey_spill.format.codec import Codec
from ray_valkey_spill.format.header import decode_header
from ray_valkey_spill.format.names import Entry
from ray_valkey_spill.format.packing import SourceObject
from ray_valkey_spill.format.sealing import TAG_SIZE, Key, KeyRing
from ray_valkey_spill.tiers.room import cost, member_cost

CHUNK = 1024
SIZE = 3 * CHUNK + 100
UNTOUCHED = 0xA5
few = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(file: Path, *secrets: bytes) -> None:
    file.write_text("".join(f"{secret.hex()}\n" for secret in secrets))


def ids(*secrets: bytes) -> list[int]:
    return [Key(secret).id for secret in secrets]


OLD, NEW, OTHER = (bytes([i]) * 32 for i in (1, 2, 3))


# --- the file of keys ---


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def test_a_file_has_keys_in_hex_or_base64_and_comments(file: Path) -> None:
    text = "\n".join(
        [
            "# made by openssl rand",
            "",
            OLD.hex(),
            f"  {NEW.hex().upper()}\t# the next one\r",
            base64.b64encode(OTHER).decode(),
        ]
    )
    file.write_text(text)
    assert [key.id for key in KeyRing(str(file)).current()] == ids(OLD, NEW, OTHER)


def not_there(file: Path) -> None:
    pass


def a_directory(file: Path) -> None:
    file.mkdir()


def holds(content: str | bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


SECRET_TEXT = secrets.token_hex(32)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (not_there, "cannot be read: No such file"),
        (a_directory, "cannot be read: Is a directory"),
        (holds(""), "has no key.*openssl rand"),
        (holds("# nothing\n\n"), "has no key.*openssl rand"),
        (holds(f"{SECRET_TEXT}\n{SECRET_TEXT[:-1]}"), "line 2 .* is not a key.*openssl rand"),
        (holds(f"\n{SECRET_TEXT}{SECRET_TEXT}"), "line 2 .* is not a key.*openssl rand"),
        (holds(base64.b64encode(bytes(16))), "line 1 .* is not a key.*openssl rand"),
        (holds(f"key={SECRET_TEXT}"), "line 1 .* is not a key.*openssl rand"),
        (holds(b"\xff\xfe" + SECRET_TEXT.encode("utf-16-le")), "line 1 .* is not a key"),
        (holds(bytes.fromhex(SECRET_TEXT)), "line [0-9]+ .* is not a key"),
    ],
)
def test_a_file_that_is_no_good_is_one_error_that_tells_nothing_of_it(
    file: Path, make: Callable[[Path], object], told: str
) -> None:
    make(file)
    with pytest.raises(ConfigError, match=told) as caught:
        KeyRing(str(file)).current()
    assert str(file) in str(caught.value)
    assert SECRET_TEXT[:16] not in str(caught.value)


def test_a_key_in_the_place_of_the_file_is_not_repeated() -> None:
    for text in (OLD.hex(), base64.b64encode(OLD).decode()):
        with pytest.raises(ConfigError, match="must be the path of a file") as caught:
            KeyRing(text).current()
        assert text not in str(caught.value)


def test_a_file_is_read_again_when_it_has_changed(file: Path, tmp_path: Path) -> None:
    write(file, OLD)
    ring = KeyRing(str(file))
    assert [key.id for key in ring.current()] == ids(OLD)
    write(tmp_path / "new", NEW, OLD)
    (tmp_path / "new").replace(file)
    assert [key.id for key in ring.current()] == ids(NEW, OLD)
    write(file, NEW)
    assert [key.id for key in ring.current()] == ids(NEW)
    file.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        ring.current()
    write(file, NEW)
    assert [key.id for key in ring.current()] == ids(NEW)


def test_a_key_that_is_not_known_has_the_file_read_even_if_it_looks_the_same(file: Path) -> None:
    write(file, OLD)
    before = file.stat()
    ring = KeyRing(str(file))
    ring.current()
    write(file, NEW)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    seal = Key(NEW).seal("k")
    _, opened = ring.open_header("k", seal.key_id, seal.seal_header(b"data", b""), b"")
    assert opened == b"data"


def test_nothing_shows_a_key(file: Path) -> None:
    write(file, OLD)
    ring = KeyRing(str(file))
    (key,) = ring.current()
    config = Config.load({"encryption_key_file": str(file)}, {})
    shown = f"{ring!r} {key!r} {key.seal('k')!r} {config!r} {key.id:x}"
    assert OLD.hex()[:8] not in shown
    assert repr(OLD)[2:10] not in shown


# --- seals ---


def test_a_seal_is_what_its_description_says() -> None:
    """So that what is sealed now can be opened by later versions."""
    subkey = hmac.digest(OLD, b"ray-valkey-spill 1 object ray:k", "sha256")
    target = memoryview(bytearray(4 + TAG_SIZE))
    seal = Key(OLD).seal("ray:k")
    seal.seal_chunk(258, b"data", target)
    nonce = b"data\0\0\0\0\0\0\1\2"
    assert AESGCM(subkey).decrypt(nonce, bytes(target), b"") == b"data"
    sealed = seal.seal_header(b"stream", b"bound")
    assert AESGCM(subkey).decrypt(b"head" + bytes(8), bytes(sealed), b"bound") == b"stream"
    fingerprint = hmac.digest(OLD, b"ray-valkey-spill 1 key id", "sha256")
    assert seal.key_id == int.from_bytes(fingerprint[:8], "big")


def sealed_chunk(secret: bytes, name: str, number: int, data: bytes) -> bytes:
    target = bytearray(len(data) + TAG_SIZE)
    Key(secret).seal(name).seal_chunk(number, data, memoryview(target))
    return bytes(target)


def opened_chunk(secret: bytes, name: str, number: int, stored: bytes) -> bytes:
    target = bytearray(max(0, len(stored) - TAG_SIZE))
    Key(secret).seal(name).open_chunk(number, stored, memoryview(target))
    return bytes(target)


WHERE = st.tuples(
    st.sampled_from([OLD, NEW]),
    st.sampled_from(["ray:a", "ray:b", "ray:a:", "ray:a:1"]),
    st.integers(0, 3) | st.integers(0, 2**40),
)


@given(here=WHERE, there=WHERE, data=st.binary(max_size=100))
def test_a_chunk_opens_in_its_place_and_nowhere_else(here: Any, there: Any, data: bytes) -> None:
    stored = sealed_chunk(*here, data)
    assert opened_chunk(*here, stored) == data
    if here != there:
        with pytest.raises(LostObjectError, match="seal is broken"):
            opened_chunk(*there, stored)


@given(data=st.binary(max_size=100), bad=st.data())
def test_a_chunk_that_is_changed_anywhere_does_not_open(data: bytes, bad: st.DataObject) -> None:
    stored = sealed_chunk(OLD, "k", 0, data)
    cut = bad.draw(st.integers(0, len(stored)))
    changed = (
        stored[:cut]
        + bad.draw(st.binary(max_size=20))
        + stored[cut + bad.draw(st.integers(0, 20)) :]
    )
    assume(changed != stored)
    with pytest.raises(LostObjectError, match="seal is broken"):
        opened_chunk(OLD, "k", 0, changed)


def test_a_seal_is_for_several_threads() -> None:
    seal = Key(OLD).seal("k")
    chunks = {number: noise(200_000, number) for number in range(40)}

    def sealed(number: int) -> memoryview:
        target = memoryview(bytearray(200_000 + TAG_SIZE))
        seal.seal_chunk(number, chunks[number], target)
        return target

    def opened(number: int, stored: memoryview) -> memoryview:
        target = memoryview(bytearray(200_000))
        seal.open_chunk(number, stored, target)
        return target

    with ThreadPoolExecutor(4) as pool:
        stored = [*pool.map(sealed, chunks)]
        assert [*pool.map(opened, chunks, stored)] == [*chunks.values()]
    assert stored == [sealed_chunk(OLD, "k", number, data) for number, data in chunks.items()]


# --- what is stored ---


@dataclass
class Vault:
    """Objects that are sealed, and past the stores the values that are kept of them.

    These are on a server, by key; or in a directory that is the overflow, by path.
    """

    server: Server
    file: Path
    directory: Path | None
    stores: list[Store] = field(default_factory=list)

    @property
    def params(self) -> dict[str, Any]:
        there = {"url": self.server.url, "chunk_size": CHUNK, "encryption_key_file": str(self.file)}
        if self.directory is not None:
            there |= {"overflow_uri": str(self.directory), "max_bytes": 0}
        return there

    def store(self, session: str = "s", node: str = "n", **params: Any) -> Store:
        self.stores.append(Store(Config.load({**self.params, **params}, {}), session, node))
        return self.stores[-1]

    def values(self, url: str = "") -> dict[str, bytes]:
        """All that is stored; or what is of one object, its header last."""
        name = url.partition("?")[0].removeprefix("overflow:").rpartition(":")[2]
        if self.directory is not None:
            files = [
                p for p in self.directory.rglob("*.*") if p.is_file() and p.name[:6] != "place."
            ]
            return {str(p): p.read_bytes() for p in files if name in p.name}
        root = "ray:spill:"
        keys = [key.decode() for key in self.server.our_keys(root) if name.encode() in key]
        keys = [key for key in keys if key.count(":") > root.count(":") + 2]
        keys.sort(key=lambda key: (-key.count(":"), key))
        return {key: self.server.client.get(key) for key in keys}

    def write(self, name: str, value: bytes) -> None:
        if self.directory is not None:
            Path(name).write_bytes(value)
        else:
            self.server.client.set(name, value)


@pytest.fixture(params=["valkey", "overflow"])
def vault(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> Iterator[Vault]:
    directory = tmp_path / "overflow" if request.param == "overflow" else None
    vault = Vault(server, tmp_path / "keys", directory)
    write(vault.file, OLD)
    yield vault
    for store in vault.stores:
        store.close()
    server.settle_foreign()


def put(store: Store, data: bytes, number: int = 0) -> str:
    source = SourceObject(f"{number:056x}", b"META-DATA", b"OWNER-ADDRESS", memoryview(data))
    urls, failure = store.put([source])
    assert failure is None
    return urls[0]


def get(store: Store, url: str, data: bytes, number: int = 0) -> bytes:
    """What is got of an object that should have `data`.

    Whatever happens, the memory for it never has anything else in it.
    """
    found = store.find(url, f"{number:056x}")
    target = bytearray([UNTOUCHED]) * found.header.size
    try:
        store.fill(found, memoryview(target))
    finally:
        for start in range(0, len(target), CHUNK):
            span = slice(start, start + CHUNK)
            assert target[span] == data[span] or set(target[span]) == {UNTOUCHED}
    return bytes(target)


def pattern(size: int, seed: int = 0) -> bytes:
    """Compressible, and different from chunk to chunk."""
    return b"".join(b"%8d" % (seed * 1000 + i // 8) for i in range(size))[:size]


SHAPES = pytest.mark.parametrize(
    ("make", "size"), [(noise, SIZE), (pattern, SIZE), (noise, 500), (pattern, 500), (noise, 0)]
)


@SHAPES
@pytest.mark.usefixtures("no_thread_left")
def test_nothing_of_an_object_can_be_read_where_it_lies(
    vault: Vault, make: Callable[[int], bytes], size: int
) -> None:
    data = make(size)
    store = vault.store()
    url = put(store, data)
    assert get(store, url, data) == data
    stored = b"".join(vault.values(url).values())
    assert len(stored) >= len(data) // 8
    shown = [b"META-DATA", b"OWNER-ADDRESS", *(data[i : i + 6] for i in range(0, size - 6, 97))]
    assert not [text for text in (*shown, b"ray_metadata") if text in stored]


@SHAPES
def test_a_bit_that_is_flipped_anywhere_is_noticed(
    vault: Vault, make: Callable[[int], bytes], size: int
) -> None:
    data = make(size)
    store = vault.store()
    url = put(store, data)
    values = vault.values(url)

    @few
    @given(st.data())
    def flip(draw: st.DataObject) -> None:
        name = draw.draw(st.sampled_from(sorted(values)))
        bit = draw.draw(st.integers(0, len(values[name]) * 8 - 1))
        bad = bytearray(values[name])
        bad[bit // 8] ^= 1 << bit % 8
        vault.write(name, bytes(bad))
        with pytest.raises(LostObjectError):
            get(store, url, data)
        vault.write(name, values[name])

    flip()
    assert get(store, url, data) == data


def test_every_bit_of_a_trailer_counts(vault: Vault) -> None:
    store = vault.store()
    url = put(store, b"data")
    ((name, value),) = vault.values(url).items()
    for bit in range(20 * 8):
        bad = bytearray(value)
        bad[-20 + bit // 8] ^= 1 << bit % 8
        vault.write(name, bytes(bad))
        with pytest.raises(LostObjectError):
            get(store, url, b"data")


@SHAPES
def test_no_value_passes_for_another_nor_do_parts_of_it(
    vault: Vault, make: Callable[..., bytes], size: int
) -> None:
    """Other chunks, attempts, objects, nodes, sessions and namespaces; and what a key seals now."""
    data = make(size)
    store = vault.store()
    url = put(store, data)
    put(store, make(size, 1))
    put(store, make(size, 2), number=1)
    put(vault.store(node="m"), make(size, 3))
    put(vault.store(session="t"), make(size, 4))
    put(vault.store(namespace="second"), make(size, 5))
    write(vault.file, NEW, OLD)
    put(store, make(size, 6))
    values, everything = vault.values(url), vault.values()
    assert len(everything) == 7 * len(values)

    @few
    @given(st.data())
    def splice(draw: st.DataObject) -> None:
        name = draw.draw(st.sampled_from(sorted(values)))
        donor = everything[draw.draw(st.sampled_from(sorted(everything)))]
        at = draw.draw(st.just(0) | st.integers(0, len(values[name])))
        until = draw.draw(st.just(len(donor)) | st.integers(at, at + len(donor)))
        bad = values[name][:at] + donor[at:until] + values[name][until:]
        assume(bad != values[name])
        vault.write(name, bad)
        with pytest.raises(LostObjectError):
            get(store, url, data)
        vault.write(name, values[name])

    splice()
    assert get(store, url, data) == data


def replay(vault: Vault, url: str, of: str) -> None:
    """Put one object's values in the place of another's."""
    for name, value in zip(vault.values(url), vault.values(of).values(), strict=True):
        vault.write(name, value)


@SHAPES
def test_no_object_passes_for_another_as_a_whole(
    vault: Vault, make: Callable[..., bytes], size: int
) -> None:
    store = vault.store()
    older, url, other = (
        put(store, make(size, 0)),
        put(store, make(size, 1)),
        put(store, make(size, 2), number=1),
    )
    elsewhere = [
        put(vault.store(node="m"), make(size, 3)),
        put(vault.store(session="t"), make(size, 4)),
        put(vault.store(namespace="second"), make(size, 5)),
    ]
    for donor in (older, other, *elsewhere):
        replay(vault, url, donor)
        with pytest.raises(LostObjectError, match="seal is broken"):
            get(store, url, make(size, 1))


def test_chunks_of_one_object_that_are_swapped_are_noticed(vault: Vault) -> None:
    data = bytes(SIZE)  # all chunks but the last are the same
    store = vault.store(compression="none")
    url = put(store, data)
    values = vault.values(url)
    sealed = CHUNK + TAG_SIZE
    if vault.directory is None:
        first, second, *_ = values
        vault.write(first, values[second])
        vault.write(second, values[first])
    else:
        ((path, value),) = values.items()
        vault.write(path, value[sealed : 2 * sealed] + value[:sealed] + value[2 * sealed :])
    with pytest.raises(LostObjectError, match=r"chunk 0 of 4 is damaged \(broken seal"):
        get(store, url, data)


def test_what_the_way_here_has_damaged_is_fetched_once_more(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = noise(SIZE)
    store = vault.store()
    url = put(store, data)
    unpack, damaged = store.packer.unpack, []

    def damages_one(header: Any, target: Any, numbers: Any, receive: Any) -> Any:
        def received(wanted: Any) -> Iterator[None]:
            asked = [*wanted]
            for (number, memory), _ in zip(asked, receive(iter(asked)), strict=True):
                if number == 2 and not damaged:
                    damaged.append(number)
                    memory[5] ^= 1
                yield

        return unpack(header, target, numbers, received)

    monkeypatch.setattr(store.packer, "unpack", damages_one)
    assert get(store, url, data) == data
    assert damaged == [2]


@pytest.mark.parametrize("data", [noise(SIZE), b"data"])
def test_what_is_not_sealed_is_refused_where_there_are_keys(vault: Vault, data: bytes) -> None:
    store, forger = vault.store(), vault.store(encryption_key_file=None)
    url, forged = put(store, data), put(forger, data)
    assert get(forger, forged, data) == data
    with pytest.raises(LostObjectError, match="not sealed although encryption_key_file is given"):
        get(store, forged, data)
    replay(vault, url, of=forged)
    for reader in (store, forger):
        with pytest.raises(LostObjectError, match="not sealed with the key that it was put with"):
            get(reader, url, data)


def test_what_is_sealed_with_a_key_of_somebody_else_is_never_read(
    vault: Vault, tmp_path: Path
) -> None:
    write(tmp_path / "stolen", OTHER)
    store = vault.store()
    forger = vault.store(encryption_key_file=str(tmp_path / "stolen"))
    url, forged = put(store, b"data"), put(forger, b"data")
    with pytest.raises(ConfigError, match=f"with key {ids(OTHER)[0]:016x}, which is not in"):
        get(store, forged, b"data")
    # Ray's URL tells which key it was, so what tells of another is not waited for.
    ((mine, value),), (bad,) = vault.values(url).items(), vault.values(forged).values()
    for wrong in (bad, value[:-8] + bad[-8:], bad[:-8] + value[-8:]):
        vault.write(mine, wrong)
        with pytest.raises(LostObjectError):
            get(store, url, b"data")


def test_without_keys_a_sealed_object_waits_for_them(vault: Vault) -> None:
    data = noise(SIZE)
    url = put(vault.store(), data)
    with pytest.raises(ConfigError, match=f"sealed with key {ids(OLD)[0]:016x}.*encryption_key_f"):
        get(vault.store(encryption_key_file=None), url, data)
    assert get(vault.store(), url, data) == data


# --- rotation, and files that go bad ---


def test_keys_are_rotated_under_running_processes(vault: Vault, tmp_path: Path) -> None:
    write(tmp_path / "theirs", OLD)
    here, there = vault.store(), vault.store(node="m", encryption_key_file=str(tmp_path / "theirs"))
    both = [vault.file, tmp_path / "theirs"]
    data = [noise(SIZE, seed) for seed in range(4)]
    urls = [put(here, data[0])]

    def all_are_got() -> bool:
        return all(
            get(store, url, value) == value
            for store in (here, there)
            for url, value in zip(urls, data)
        )

    for number, steps in enumerate([(OLD, NEW), (NEW, OLD), (NEW, OLD)], 1):
        for file in both:
            write(file, *steps)
            assert all_are_got()
        urls.append(put(here, data[number]))
        assert all_are_got()
    for file in both:
        write(file, NEW)
    # What the key sealed that is not there any more waits for it.
    for store in (here, there):
        with pytest.raises(ConfigError, match=f"key {ids(OLD)[0]:016x}"):
            get(store, urls[0], data[0])
        assert get(store, urls[3], data[3]) == data[3]
    write(vault.file, NEW, OLD)
    assert get(here, urls[0], data[0]) == data[0]


def test_a_node_that_lacks_a_key_waits_for_it(vault: Vault, tmp_path: Path) -> None:
    write(tmp_path / "theirs", OTHER)
    url = put(vault.store(), b"data")
    store = vault.store(encryption_key_file=str(tmp_path / "theirs"))
    with pytest.raises(ConfigError, match=r"not in encryption_key_file .*theirs.*Add that key"):
        get(store, url, b"data")
    write(tmp_path / "theirs", OTHER, OLD)
    assert get(store, url, b"data") == b"data"


@pytest.mark.parametrize("size", [500, SIZE, 400_000])
def test_while_the_file_is_no_good_all_wait_and_nothing_is_lost(vault: Vault, size: int) -> None:
    data = noise(size)
    store = vault.store()
    url = put(store, data)
    before = vault.values()
    assert before
    for spoil in (vault.file.unlink, lambda: vault.file.write_text("no key")):
        spoil()
        source = SourceObject("ab", b"", b"", memoryview(data))
        urls, failure = store.put([source])
        assert urls == []
        assert isinstance(failure, ConfigError)
        with pytest.raises(ConfigError, match="encryption_key_file"):
            get(store, url, data)
        assert vault.values() == before
        write(vault.file, OLD)
        assert get(store, url, data) == data
        store.delete([put(store, data)])
    store.delete([url])
    assert vault.values() == {}


def test_no_store_needs_its_file_before_its_first_use(vault: Vault) -> None:
    vault.file.unlink()
    store = vault.store()
    write(vault.file, OLD)
    assert get(store, put(store, b"data"), b"data") == b"data"


# --- what else there is of it ---


def test_what_is_counted_is_what_is_stored(server: Server, tmp_path: Path) -> None:
    vault = Vault(server, tmp_path / "keys", None)
    write(vault.file, OLD)
    for size in (500, SIZE):
        store = vault.store()
        put(store, noise(size))
        (entry,) = (Entry.parse(e.decode()) for e in server.client.zrange(store.keys.index, 0, -1))
        sizes = {key: len(value) for key, value in vault.values().items()}
        assert sum(sizes.values()) >= size + TAG_SIZE * (1 + max(1, entry.name.chunks))
        keys = sum(cost(len(key), length) for key, length in sizes.items())
        assert entry.stored == keys + member_cost(len(str(entry.name)))
        store.destroy(lambda pid: False)
        store.close()


def run(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "80"}).invoke(commands.cli, arguments)


@pytest.mark.parametrize("size", [500, SIZE])
def test_inspect_opens_with_the_keys_and_tells_when_it_has_none(
    vault: Vault, size: int, tmp_path: Path
) -> None:
    url = put(vault.store(), noise(size))
    options = ["--url", vault.server.url]
    if vault.directory is not None:
        options += ["--overflow-uri", str(vault.directory)]
    key = f"{ids(OLD)[0]:016x}"
    opened = run("inspect", url, *options, "--encryption-key-file", str(vault.file))
    assert opened.exit_code == 0, opened.output
    assert f"sealed with key {key}" in opened.output
    assert "META-DATA" in opened.output
    sealed = run("inspect", url, *options)
    assert isinstance(sealed.exception, SpillError)
    assert "META-DATA" not in sealed.output
    assert f"sealed with key {key}" in " ".join(sealed.output.split())
    assert "encryption_key_file" in str(sealed.exception)
    write(tmp_path / "others", OTHER)
    other = run("inspect", url, *options, "--encryption-key-file", str(tmp_path / "others"))
    assert f"sealed with key {key}, which is not in" in str(other.exception)
    missing = run("inspect", url, *options, "--encryption-key-file", "/not/there")
    assert isinstance(missing.exception, ConfigError)
    for command in (["ls"], ["stats"]):
        assert run(*command, *options).exit_code == 0


# --- in Ray ---


def session_logs() -> list[str]:
    """All that Ray and its workers have logged, and their command lines."""
    directory = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    texts = [path.read_text(errors="replace") for path in directory.rglob("*") if path.is_file()]
    children = psutil.Process().children(recursive=True)
    return texts + [title(child) for child in children]


@pytest.mark.slow
def test_ray_spills_sealed_takes_nothing_that_is_forged_and_waits_for_keys(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "keys"
    secret = secrets.token_bytes(32)
    write(file, secret)
    monkeypatch.setenv("RAY_VALKEY_SPILL_ENCRYPTION_KEY_FILE", str(file))
    values = [np.frombuffer(noise(3 * MIB, i), np.uint8) for i in range(4)]
    with local_ray(server.url):
        refs = [ray.put(value) for value in values]
        spill(refs, server)
        kept = {key: server.client.get(key) for ref in refs for key in server.keys_of(ref.hex())}
        spilled, plain = b"".join(kept.values()), values[3].tobytes()
        assert len(spilled) > 4 * len(plain)
        assert not [i for i in range(0, len(plain), 100_000) if plain[i : i + 16] in spilled]
        name = server.header_of(refs[0].hex())
        header, _ = decode_header(server.client.get(name), name.decode(), KeyRing(str(file)))
        assert {chunk.codec for chunk in header.chunks} == {Codec.RAW}
        # What one object's owner may write in the place of another's.
        for key, donor in zip(server.keys_of(refs[0].hex()), server.keys_of(refs[1].hex())):
            server.client.set(key, kept[donor])
        with pytest.raises(ObjectLostError):
            ray.get(refs[0], timeout=PATIENCE)
        # A key that is away for a while.
        write(file, OTHER)
        ray.wait(refs[1:2], timeout=0)
        wait_until(lambda: any("is not in encryption_key_file" in text for text in session_logs()))
        write(file, OTHER, secret)
        for ref, value in zip(refs[1:], values[1:]):
            assert (ray.get(ref, timeout=PATIENCE) == value).all()
        logs = session_logs()
    server.settle_foreign()
    assert logs
    assert not any(secret.hex() in text or repr(secret)[2:-1] in text for text in logs)
