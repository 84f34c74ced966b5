"""The overflow, in a directory and in an S3-compatible store: alone, in the store, and with Ray."""

from __future__ import annotations

import contextlib
import functools
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from support.clusters import MIB, expect_no_keys, local_ray
from support.objectstores import BUCKET, CREDENTIALS, ObjectStoreServer, s3_server, s3_uri
from support.samples import get, noise, source
from support.servers import (
    PATIENCE,
    Server,
    dead_port,
    valkey_server,
    wait_until,
)
from support.stores import Store

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    ConfigError,
    LostObjectError,
    OverflowUnavailableError,
    ServerUnavailableError,
)
from ray_valkey_spill.format.names import Entry, Keyspace, NodeName, ObjectName, Place, new_attempt
from ray_valkey_spill.format.packing import Receive
from ray_valkey_spill.format.values import Value
from ray_valkey_spill.tiers.ledger import Grant, Ledger, link_to
from ray_valkey_spill.tiers.overflow import OverflowTier

SESSION, NODE = "session_1", "ab" * 28
OWNER = NodeName(SESSION, NODE)
KEYSPACE = Keyspace("ray:spill:default:")
CHUNK = 10_000


@dataclass
class Directory:
    """A directory as the overflow, and what is in it past our code."""

    path: Path

    @property
    def uri(self) -> str:
        return self.path.as_uri()

    def files(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for path in self.path.rglob("*.*"):
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                if path.is_file():
                    found[str(path.relative_to(self.path))] = path.stat().st_size
        return found

    def is_empty(self) -> bool:
        return not self.path.exists() or not list(self.path.iterdir())

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (self.path / name).write_bytes(data)

    def delete(self, name: str) -> None:
        (self.path / name).unlink()

    def drop(self) -> None:
        shutil.rmtree(self.path)


@dataclass
class Bucket:
    """A path in an S3 bucket as the overflow, and what is in it past our code."""

    server: ObjectStoreServer

    @property
    def uri(self) -> str:
        return self.server.uri()

    def files(self) -> dict[str, int]:
        found = self.server.objects()
        return {key.removeprefix("over flow/"): size for key, size in found.items()}

    def is_empty(self) -> bool:
        # What pyarrow keeps for the namespace's directory is one empty object, whatever was in it.
        kept = {"over flow/ray:spill:default/"}
        return not self.files() and not self.server.uploads() and self.server.directories() <= kept

    def read(self, name: str) -> bytes:
        found = self.server.client.get_object(Bucket=BUCKET, Key=f"over flow/{name}")
        return bytes(found["Body"].read())

    def write(self, name: str, data: bytes) -> None:
        self.server.client.put_object(Bucket=BUCKET, Key=f"over flow/{name}", Body=data)

    def delete(self, name: str) -> None:
        self.server.client.delete_object(Bucket=BUCKET, Key=f"over flow/{name}")

    def drop(self) -> None:
        self.server.empty()


Place_ = Directory | Bucket


@pytest.fixture(scope="module")
def _s3() -> Iterator[ObjectStoreServer]:
    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(_s3: ObjectStoreServer, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    _s3.empty()
    return Bucket(_s3)


@pytest.fixture(params=["directory", "S3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "directory":
        return Directory(tmp_path / "over flow")
    return request.getfixturevalue("bucket")


_made: list[OverflowTier] = []


@pytest.fixture(autouse=True)
def _tiers_are_closed() -> Iterator[None]:
    yield
    while _made:
        _made.pop().close()


@pytest.fixture
def tier(place: Place_) -> OverflowTier:
    """An overflow that a session has signed."""
    tier = tier_at(place.uri)
    tier.sign(SESSION, "signed")
    return tier


def tier_at(uri: str) -> OverflowTier:
    _made.append(OverflowTier(uri, KEYSPACE))
    return _made[-1]


def new_name(number: int = 0, chunks: int = 3, owner: NodeName = OWNER) -> ObjectName:
    return ObjectName(*owner, f"{number:056x}", new_attempt(), chunks)


def values(name: ObjectName, header: bytes = b"header") -> list[Value]:
    """An object as values: as many chunks as its name tells, and a header, which is not one."""
    size = CHUNK * name.chunks
    chunks = [Value(f"{name}:{i}", name, size, [noise(CHUNK, i)]) for i in range(name.chunks)]
    return [*chunks, Value(str(name), name, size, [header], is_last=True)]


def write(tier: OverflowTier, *names: ObjectName) -> list[Entry]:
    return list(tier.write(value for name in names for value in values(name)))


def read(tier: OverflowTier, place: Place, wanted: Sequence[tuple[int, memoryview]]) -> int:
    """Receive chunks of an object, which are of `CHUNK` bytes; returns how many were received."""
    sizes = [CHUNK] * place.name.chunks
    return tier.read(place, sizes, lambda receive: sum(1 for _ in receive(wanted)))


def is_alive(pid: int) -> bool:
    return False


@pytest.fixture
def stores(server: Server) -> Iterator[Callable[..., Store]]:
    """Makes object stores; those with an overflow put everything there unless told otherwise."""
    made: list[Store] = []

    def make(uri: str | None = None, node: str = NODE, **params: Any) -> Store:
        params = {"overflow_uri": uri, "chunk_size": CHUNK, "max_bytes": 0, **params}
        config = Config.load({"url": server.url, **params}, {})
        made.append(Store(config, SESSION, node))
        return made[-1]

    yield make
    for store in made:
        try:
            store.destroy(is_alive)
        except OverflowUnavailableError:
            # The token stays, by which a clean-up finds the files once they are there again.
            server.client.delete(store.keys.overflows)
        store.close()


def test_without_room_for_anything_no_replica_is_waited_for(
    server: Server, stores: Callable[..., Store], tmp_path: Path
) -> None:
    """There is nothing that they could have."""
    server.client.config_resetstat()
    store = stores(tmp_path.as_uri(), min_replicas=1)
    store.renew_lease("", lambda: False)
    store.join_overflow()
    urls, failure = store.put([source(noise(3 * CHUNK))])
    assert failure is None
    assert get(store, urls[0]) == noise(3 * CHUNK)
    assert "cmdstat_wait" not in server.client.info("commandstats")


# --- a file an object ---


def test_what_was_written_is_read_by_whole_objects_and_by_single_chunks(
    tier: OverflowTier,
) -> None:
    name = new_name(chunks=2000)
    (entry,) = write(tier, name)
    found = Place(name, entry.size, "overflow")
    assert entry.stored == entry.size + len(b"header")
    for numbers in (range(2000), [1999], [0, 1, 2, 700, 701, 1500], []):
        wanted = [(number, memoryview(bytearray(CHUNK))) for number in numbers]
        assert read(tier, found, wanted) == len(wanted)
        assert [bytes(into) for _, into in wanted] == [noise(CHUNK, n) for n in numbers]


def test_a_file_that_ends_too_soon_is_lost(tier: OverflowTier, place: Place_) -> None:
    name = new_name(chunks=3)
    (entry,) = write(tier, name)
    (file,) = [file for file in place.files() if "place." not in file]
    place.write(file, place.read(file)[: CHUNK + 1])
    wanted = [(number, memoryview(bytearray(CHUNK))) for number in range(3)]
    with pytest.raises(LostObjectError, match="ends in chunk 1"):
        read(tier, Place(name, entry.size), wanted)


def test_a_read_that_is_given_up_leaves_no_thread_once_the_overflow_is_closed(
    tier: OverflowTier,
) -> None:
    tier.close()
    before = set(threading.enumerate())
    name = new_name(chunks=2000)
    (entry,) = write(tier, name)
    wanted = [(number, memoryview(bytearray(CHUNK))) for number in range(2000)]
    sizes, place = [CHUNK] * 2000, Place(name, entry.size)
    tier.read(place, sizes, lambda receive: next(receive(wanted)))
    tier.close()
    assert set(threading.enumerate()) <= before
    assert read(tier, place, wanted) == 2000


@pytest.mark.parametrize("chunks", [0, 1, 3, 1200])
def test_writing_that_is_given_up_leaves_nothing_of_the_object(
    tier: OverflowTier, place: Place_, chunks: int
) -> None:
    before = place.files()

    def given_up() -> Iterator[Value]:
        yield from values(new_name(chunks=chunks))[:-1]
        raise LostObjectError("given up")

    with pytest.raises(LostObjectError, match="given up"):
        list(tier.write(given_up()))
    assert place.files() == before
    if isinstance(place, Bucket):
        assert place.server.uploads() == []


def test_what_could_not_be_removed_after_a_failure_goes_with_the_next_write(tmp_path: Path) -> None:
    place, away = Directory(tmp_path / "share"), tmp_path / "away"
    tier = tier_at(place.uri)
    tier.sign(SESSION, "signed")

    def with_the_share_gone() -> Iterator[Value]:
        name = new_name()
        yield Value(f"{name}:0", name, 4 * MIB, [bytes(4 * MIB)])
        place.path.rename(away)
        place.path.write_bytes(b"not a directory")
        raise LostObjectError("given up")

    with pytest.raises(LostObjectError, match="given up"):
        list(tier.write(with_the_share_gone()))
    place.path.unlink()
    away.rename(place.path)
    assert [file for file in place.files() if file.endswith(".part")]
    write(tier, new_name(1))
    assert not [file for file in place.files() if file.endswith(".part")]


def test_owners_files_and_their_lengths_are_told_and_destroyed_by_the_owner(
    tier: OverflowTier, place: Place_
) -> None:
    owners = [OWNER, NodeName(SESSION, "cd" * 28), NodeName("session_2", NODE)]
    tier.sign("session_2", "signed")
    for number, owner in enumerate(owners):
        write(tier, *(new_name(i, owner=owner) for i in range(number + 1)))
    assert tier.node_names() == set(owners)
    for number, owner in enumerate(owners):
        found = list(tier.files(owner))
        assert len(found) == number + 1
        assert {file.entry.stored for file in found} == {3 * CHUNK + len(b"header")}
        assert all(file.is_whole for file in found)
    assert tier.destroy(OWNER) == 1
    assert tier.destroy(OWNER) == 0
    assert tier.node_names() == set(owners[1:])
    tier.destroy_session("session_2")
    assert tier.node_names() == {owners[1]}
    assert tier.destroy(owners[1]) == 2
    assert tier.is_signed(SESSION, "signed")
    tier.unsign(SESSION, "signed")
    assert place.is_empty()


def test_a_node_is_destroyed_while_its_processes_write_and_remove(tmp_path: Path) -> None:
    tier, done = tier_at(str(tmp_path)), threading.Event()
    tier.sign(SESSION, "signed")

    def write_and_remove() -> None:
        while not done.is_set():
            # The directory may go at any moment, and the object with it.
            with contextlib.suppress(OverflowUnavailableError):
                first, _ = write(tier, new_name(1, chunks=1), new_name(2, chunks=1))
                tier.remove(Place(first.name, first.size))

    writers = [threading.Thread(target=write_and_remove) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(40):
            wait_until(lambda: len(list(tier.files(OWNER))) > 5)
            tier.destroy(OWNER)
    finally:
        done.set()
        for writer in writers:
            writer.join()
    tier.destroy(OWNER)
    assert tier.node_names() == set()


@pytest.mark.parametrize("depth", range(3))
def test_no_link_in_the_overflow_has_anything_elsewhere_removed(tmp_path: Path, depth: int) -> None:
    """Others may write to the directory: a session, a node, or what is below it may be a link."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").touch()
    tier = tier_at(str(tmp_path / "overflow"))
    tier.sign(SESSION, "signed")
    write(tier, new_name())
    (file,) = tier.files(OWNER)
    node = Path(file.path).parent
    linked = [node.parent, node, node / "more"][depth]
    if depth < 2:
        linked.rename(tmp_path / "moved")
    linked.symlink_to(victim)
    tier.destroy(OWNER)
    tier.destroy_session(SESSION)
    assert [path.name for path in victim.iterdir()] == ["file"]
    assert not linked.is_symlink()


def test_foreign_files_are_told_from_ours_and_stay(tmp_path: Path) -> None:
    place = Directory(tmp_path)
    (tmp_path / "others").mkdir()
    place.write("others/file.txt", b"x")
    tier = tier_at(place.uri)
    tier.sign(SESSION, "signed")
    write(tier, new_name())
    (node,) = (path for path in tmp_path.glob("ray*/*/*") if path.is_dir())
    (node / "notes.txt").write_bytes(b"x")
    (node / "a.1.part").write_bytes(b"x")
    assert len(list(tier.files(OWNER))) == 1
    tier.destroy_session(SESSION)
    assert place.files() == {"others/file.txt": 1}


@pytest.mark.parametrize("name", ["../../../victim", "..", ".", "", "/etc", "x/../../../../victim"])
def test_no_name_from_the_server_leads_out_of_its_place(tmp_path: Path, name: str) -> None:
    """Who writes to the server could else have a clean-up remove any directory."""
    (tmp_path / "victim").mkdir()
    tier = tier_at(str(tmp_path / "some" / "overflow"))
    tier.sign(SESSION, "signed")
    before = {*tmp_path.rglob("*")}
    owner, place = (
        NodeName(name, "n"),
        Place(ObjectName(name, "n", "ab", "0" * 27, 0), 1, "overflow"),
    )
    uses: list[Callable[[], object]] = [
        lambda: tier.destroy_session(name),
        lambda: tier.destroy(owner),
        lambda: tier.destroy(NodeName(SESSION, name)),
        lambda: tier.remove_parts(owner, lambda pid: False),
        lambda: tier.remove(place),
        lambda: tier.stat(place),
        lambda: tier.sign(name, "token"),
        lambda: tier.unsign(name, "token"),
    ]
    for use in uses:
        with pytest.raises(OverflowUnavailableError, match="cannot be a name in the overflow"):
            use()
    if "/" in name:
        with pytest.raises(OverflowUnavailableError, match="cannot be a name in the overflow"):
            tier.unsign(SESSION, f"../{name}")
    assert {*tmp_path.rglob("*")} == before


@pytest.mark.slow
def test_more_objects_than_a_store_lists_at_once_are_all_found(bucket: Bucket) -> None:
    tier = tier_at(bucket.uri)
    tier.sign(SESSION, "signed")
    names = [new_name(i, chunks=0) for i in range(1100)]
    directory = f"ray:spill:default/{SESSION}/{NODE}"
    for name in names:
        bucket.write(f"{directory}/{str(name).rpartition(':')[2]}.1", b"x")
    assert {file.entry.name for file in tier.files(OWNER)} == set(names)
    assert tier.destroy(OWNER) == 1100
    assert [file for file in bucket.files() if "place." not in file] == []


@pytest.mark.parametrize(
    "form",
    [
        "{path}/over flow",
        "{path}/100%25",
        "file://{path}/over%20flow",
        "{path}/odd?x=1#y",
        "{path}/",
    ],
)
def test_a_directory_can_be_given_as_a_path_or_as_a_uri(tmp_path: Path, form: str) -> None:
    uri = form.format(path=tmp_path)
    tier = tier_at(uri)
    tier.sign(SESSION, "signed")
    write(tier, new_name())
    directory = uri.removeprefix("file://").replace("%20", " " if "file:" in uri else "%20")
    assert tier_at(directory).is_signed(SESSION, "signed")
    assert (Path(directory) / "ray:spill:default" / SESSION / "place.signed").exists()


def test_a_relative_path_is_refused(server: Server) -> None:
    with pytest.raises(ConfigError, match="overflow_uri must be an absolute path"):
        Config.load({"url": server.url, "overflow_uri": "spilled/here"}, {})


def test_an_upload_holds_no_more_than_a_part_of_an_object(bucket: Bucket) -> None:
    tier = tier_at(bucket.uri)
    tier.sign(SESSION, "signed")
    write(tier, new_name())
    name, data = new_name(1, chunks=150), noise(MIB)
    before, grown = psutil.Process().memory_info().rss, 0

    def large() -> Iterator[Value]:
        nonlocal grown
        for number in range(150):
            yield Value(f"{name}:{number}", name, 150 * MIB, [data])
            grown = max(grown, psutil.Process().memory_info().rss - before)
        yield Value(str(name), name, 150 * MIB, [b""], is_last=True)

    assert len(list(tier.write(large()))) == 1
    assert grown < 48 * MIB


def test_what_is_sealed_is_not_to_be_read_or_changed_there(
    stores: Callable[..., Store], place: Place_, tmp_path: Path
) -> None:
    key_file = tmp_path / "spill.key"
    key_file.write_text("ab" * 32)
    store = stores(place.uri, encryption_key_file=str(key_file))
    known = bytes(range(256)) * 4 * CHUNK
    urls, failure = store.put([source(known, 0), source(b"inline" * 100, 1)])
    assert failure is None
    assert [get(store, url, number) for number, url in enumerate(urls)] == [known, b"inline" * 100]
    files = [name for name in place.files() if "place." not in name]
    assert len(files) == 2
    for name in files:
        stored = place.read(name)
        assert known[:64] not in stored
        assert b"inline" not in stored
        place.write(name, stored[:100] + bytes([stored[100] ^ 1]) + stored[101:])
    for number, url in enumerate(urls):
        with pytest.raises(LostObjectError, match="seal"):
            get(store, url, number)


# --- killed writers ---

DYING_WRITER = """
import sys
from ray_valkey_spill.format.names import Entry, Keyspace, ObjectName, new_attempt
from ray_valkey_spill.tiers.overflow import OverflowTier
from ray_valkey_spill.format.values import Value

uri, session, node, sent = sys.argv[1:]
tier = OverflowTier(uri, Keyspace("ray:spill:default:"))
name = ObjectName(session, node, "a" * 56, new_attempt(), 40)

def values():
    for number in range(int(sent)):
        yield Value(f"{name}:{number}", name, 40_000_000, [bytes(1_000_000)])
    print("now", flush=True)
    sys.stdin.read()

list(tier.write(values()))
"""


@contextlib.contextmanager
def dying_writer(uri: str, sent: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that stops in the middle of an object, after so many chunks of 1 MB."""
    process = subprocess.Popen(
        [sys.executable, "-c", DYING_WRITER, uri, SESSION, NODE, str(sent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == b"now\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("sent", [2, 15])
def test_a_killed_writer_leaves_nothing_that_looks_whole(
    tier: OverflowTier, place: Place_, sent: int
) -> None:
    write(tier, new_name(1))
    with dying_writer(place.uri, sent) as writer:
        tier.remove_parts(OWNER, lambda pid: pid == writer.pid)
        alive = list(tier.files(OWNER))
    left = list(tier.files(OWNER))
    assert [file.is_whole for file in left].count(True) == 1
    # What was on its way may have made one longer since.
    assert [(file.path, file.is_whole) for file in left] == [(f.path, f.is_whole) for f in alive]
    tier.remove_parts(OWNER, lambda pid: pid != writer.pid)
    (kept,) = tier.files(OWNER)
    assert kept.entry.name.object_id == f"{1:056x}"


def test_a_file_that_is_being_written_is_no_object(tier: OverflowTier, place: Place_) -> None:
    with dying_writer(place.uri, 2) as writer:
        found = list(tier.files(OWNER))
        if isinstance(place, Bucket):
            assert found == []
            return
        assert [file.is_whole for file in found] == [False]
        assert found[0].entry.name.writer == writer.pid
        assert tier.destroy(OWNER) == 0


# --- places that cannot be used ---


def missing_directory(path: Path, port: int) -> str:
    (path / "file").write_bytes(b"")
    return f"{path}/file/below"


def missing_bucket(path: Path, port: int) -> str:
    return s3_uri("nobody-has-this/x", port)


def nobody_there(path: Path, port: int) -> str:
    return s3_uri("spilled/x", dead_port())


def nobody_there_for_gcs(path: Path, port: int) -> str:
    where = f"127.0.0.1:{dead_port()}"
    return f"gs://anonymous@spilled/x?endpoint_override={where}&scheme=http"


def nonsense(path: Path, port: int) -> str:
    return "s3://spilled/x?sig=hidden-one&a b"


UNUSABLE = [missing_directory, missing_bucket, nobody_there, nobody_there_for_gcs, nonsense]


@pytest.mark.parametrize("where", UNUSABLE, ids=lambda where: where.__name__)
def test_a_place_that_cannot_be_used_is_named_without_what_may_be_secret(
    bucket: Bucket, tmp_path: Path, where: Callable[[Path, int], str]
) -> None:
    uri = where(tmp_path, bucket.server.port)
    with pytest.raises(OverflowUnavailableError) as raised:
        tier_at(uri).sign(SESSION, "signed")
    message = str(raised.value)
    assert uri.partition("?")[0].replace("anonymous@", "") in message
    assert "hidden" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "use",
    [
        lambda tier: tier.node_names(),
        lambda tier: list(tier.files(OWNER)),
        lambda tier: tier.destroy(OWNER),
        lambda tier: tier.unsign(SESSION, "signed"),
        lambda tier: tier.remove(Place(new_name(), 1)),
        lambda tier: write(tier, new_name()),
    ],
)
def test_a_uri_that_means_nothing_is_told_by_whatever_uses_it_first(use: Any) -> None:
    with pytest.raises(OverflowUnavailableError, match="s3://spilled/x cannot be used"):
        use(tier_at("s3://spilled/x?no=such&option"))


def test_wrong_credentials_are_told_and_not_shown(bucket: Bucket) -> None:
    tier = tier_at(bucket.uri)
    tier.sign(SESSION, "signed")
    name = new_name()
    with bucket.server.checking_credentials():
        for use in (
            lambda: tier.sign(SESSION, "again"),
            lambda: write(tier, name),
            lambda: tier.stat(Place(name, 3 * CHUNK)),
            lambda: tier.is_signed(SESSION, "signed"),
            lambda: list(tier.files(OWNER)),
            lambda: tier.destroy(OWNER),
        ):
            with pytest.raises(OverflowUnavailableError, match="s3://spilled") as raised:
                use()
            assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in str(raised.value)
    write(tier, name)


ENDLESS = """
import sys
from ray_valkey_spill.format.names import Keyspace
from ray_valkey_spill.errors import OverflowUnavailableError
from ray_valkey_spill.tiers.overflow import OverflowTier
try:
    OverflowTier(sys.argv[1], Keyspace("ray:spill:default:")).sign("session", "token")
except OverflowUnavailableError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("uri", "most_attempts"),
    [
        # Left to itself, S3's client makes ten attempts, and the process cannot end before.
        ("s3://spilled/x?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1", 2),
        ("gs://anonymous@spilled/x?endpoint_override=127.0.0.1:{port}&scheme=http", 1),
    ],
)
@pytest.mark.usefixtures("bucket")
def test_a_place_that_never_answers_is_given_up_and_lets_the_process_end(
    uri: str, most_attempts: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = uri.format(port=silent.getsockname()[1])
        told = subprocess.run(
            [sys.executable, "-c", ENDLESS, uri],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert f"the overflow at {uri[:2]}://spilled/x" in told.stdout
        silent.setblocking(False)
        for _ in range(most_attempts):
            silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()


# --- no room ---


@contextlib.contextmanager
def tmpfs(path: Path, size: str) -> Iterator[bool]:
    """A small file system; False without the right to mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(path)], check=True)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as directory, tmpfs(Path(directory), "1m") as mounted:
        return mounted


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Directory]:
    with tmpfs(tmp_path, "4m"):
        yield Directory(tmp_path)


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a tmpfs")
def test_a_full_disk_is_told_once_and_nothing_is_left_of_what_did_not_fit(
    small_disk: Directory, stores: Any
) -> None:
    store = stores(small_disk.uri)
    store.join_overflow()
    urls, failure = store.put([source(noise(3 * MIB >> 1, i), i) for i in range(5)])
    assert len(urls) == 2
    assert isinstance(failure, OverflowUnavailableError)
    assert f"the overflow at {small_disk.uri} is full" in str(failure)
    assert "Make room there" in str(failure)
    assert len([file for file in small_disk.files() if "place." not in file]) == 2
    assert [get(store, url, i) for i, url in enumerate(urls)] == [
        noise(3 * MIB >> 1, i) for i in range(2)
    ]
    store.delete(urls)
    urls, failure = store.put([source(noise(3 * MIB >> 1))])
    assert failure is None
    assert get(store, urls[0]) == noise(3 * MIB >> 1)


# --- in the object store ---


def test_a_damaged_file_is_lost_and_never_read(stores: Any, place: Place_) -> None:
    store = stores(place.uri)
    damages: dict[str, Callable[[bytes, bytes], bytes | None]] = {
        "deleted": lambda data, other: None,
        "emptied": lambda data, other: b"",
        "cut off at its end": lambda data, other: data[:-1],
        "cut off in its chunks": lambda data, other: data[: len(data) // 3],
        "cut off at its front": lambda data, other: data[1:],
        "grown": lambda data, other: data + b"x",
        "a bit flipped in a chunk": lambda data, other: flipped(data, len(data) // 3),
        "a bit flipped in the header": lambda data, other: flipped(data, len(data) - 200),
        "a bit flipped at the end": lambda data, other: flipped(data, len(data) - 15),
        "swapped with another": lambda data, other: other,
        "zeros": lambda data, other: bytes(len(data)),
    }
    for size in (6 * CHUNK - 1, CHUNK // 2):
        for name, damage in damages.items():
            before = place.files()
            urls, _ = store.put([source(noise(size, 1), 1), source(noise(size, 2), 2)])
            first, second = sorted(place.files().keys() - before.keys() - _signatures(place))
            damaged = damage(place.read(first), place.read(second))
            if damaged is None:
                place.delete(first)
            else:
                place.write(first, damaged)
            with pytest.raises(LostObjectError, match=f"{1:056x}"):
                pytest.fail(f"{name}: {get(store, urls[0], 1)!r}")
            assert get(store, urls[1], 2) == noise(size, 2), name
            store.delete(urls)
    assert place.files().keys() == _signatures(place)


def _signatures(place: Place_) -> set[str]:
    return {file for file in place.files() if "/place." in file}


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def test_a_damaged_chunk_is_read_a_second_time_by_itself(stores: Any, place: Place_) -> None:
    store = stores(place.uri)
    (url,), _ = store.put([source(noise(2000 * CHUNK))])
    found = store.find(url, f"{0:056x}")
    tier, asked = store.overflow, []
    read = tier.read

    def bad_once(place: Place, sizes: Any, use: Callable[[Receive], Any], *token: Any) -> Any:
        def bad(receive: Receive, wanted: Iterable[tuple[int, memoryview]]) -> Iterator[None]:
            wanted = list(wanted)
            asked.append([number for number, _ in wanted])
            for (number, into), _ in zip(wanted, receive(wanted)):
                if len(asked) == 1 and number in (3, 4, 1500):
                    into[:] = bytes(len(into))
                yield

        return read(place, sizes, lambda receive: use(functools.partial(bad, receive)), *token)

    tier.read = bad_once
    target = bytearray(found.header.size)
    store.fill(found, memoryview(target))
    assert target == noise(2000 * CHUNK)
    assert asked[1:] == [[3, 4, 1500]]


def test_an_object_marked_lost_stays_lost(stores: Any, place: Place_) -> None:
    store = stores(place.uri)
    (url,), _ = store.put([source(noise(3 * CHUNK))])
    store.mark_lost(store.find(url, f"{0:056x}"))
    with pytest.raises(LostObjectError):
        get(store, url)


def test_a_place_that_is_gone_is_not_taken_for_lost_objects(stores: Any, place: Place_) -> None:
    """As a share that is not mounted any more, or a bucket that a policy hides."""
    store = stores(place.uri)
    (url,), _ = store.put([source(noise(3 * CHUNK))])
    found = store.find(url, f"{0:056x}")
    place.drop()
    for use in (lambda: store.find(url, f"{0:056x}"), lambda: store.fill(found, _target(found))):
        with pytest.raises(OverflowUnavailableError, match="has nothing of session"):
            use()


def _target(found: Any) -> memoryview:
    return memoryview(bytearray(found.header.size))


def test_what_cannot_be_deleted_as_a_share_is_not_mounted_is_deleted_when_it_is(
    stores: Any, tmp_path: Path
) -> None:
    place, away = Directory(tmp_path / "share"), tmp_path / "away"
    store = stores(place.uri)
    urls, _ = store.put([source(noise(3 * CHUNK), i) for i in range(2)])
    place.path.rename(away)
    place.path.mkdir()
    with pytest.raises(OverflowUnavailableError, match="has nothing of session"):
        store.delete(urls)
    place.path.rmdir()
    away.rename(place.path)
    # And the signature.
    assert len(place.files()) == 3
    for _ in range(2):
        store.delete(urls)
        assert len(place.files()) == 1


def test_nothing_is_written_where_a_share_was_mounted(stores: Any, tmp_path: Path) -> None:
    place = Directory(tmp_path / "share")
    store = stores(place.uri)
    urls, _ = store.put([source(noise(3 * CHUNK))])
    place.path.rename(tmp_path / "away")
    place.path.mkdir()
    urls, failure = store.put([source(noise(3 * CHUNK))])
    assert urls == []
    assert isinstance(failure, OverflowUnavailableError)
    assert place.is_empty()


@pytest.fixture
def refusing(server: Server) -> Iterator[Callable[[], None]]:
    """The server takes no writes until this is called."""
    server.client.config_set("min-replicas-to-write", 1)

    def take() -> None:
        server.client.config_set("min-replicas-to-write", 0)

    yield take
    take()


def test_joins_that_fail_leave_no_signature(
    stores: Any, place: Place_, refusing: Callable[[], None]
) -> None:
    store = stores(place.uri, retry_timeout=0.2)
    for _ in range(3):
        with pytest.raises(ServerUnavailableError):
            store.join_overflow()
    refusing()
    store.join_overflow()
    (signature,) = place.files()
    assert signature.rpartition("/")[2].startswith("place.")


def test_a_signature_below_a_mount_point_does_not_pass_for_that_of_the_share(
    stores: Any, tmp_path: Path, refusing: Callable[[], None]
) -> None:
    """One that failed to join has left it there, before the share was mounted."""
    place, share, bare = (Directory(tmp_path / name) for name in ("mnt", "share", "bare"))
    place.path.mkdir()
    share.path.mkdir()
    store = stores(place.uri, retry_timeout=0.2)
    with pytest.raises(ServerUnavailableError):
        store.join_overflow()
    refusing()
    place.path.rename(bare.path)
    share.path.rename(place.path)
    (url,), _ = store.put([source(noise(3 * CHUNK))])
    place.path.rename(share.path)
    bare.path.rename(place.path)
    before = place.files()
    assert len(before) == 1
    for use in (lambda: store.find(url, f"{0:056x}"), lambda: store.delete([url])):
        with pytest.raises(OverflowUnavailableError):
            use()
    urls, failure = store.put([source(noise(3 * CHUNK))])
    assert urls == [] and isinstance(failure, OverflowUnavailableError)
    assert place.files() == before
    place.path.rename(bare.path)
    share.path.rename(place.path)
    assert get(store, url) == noise(3 * CHUNK)


def test_a_node_with_another_place_is_told_and_writes_and_reads_nothing_there(
    stores: Any, place: Place_, tmp_path: Path
) -> None:
    store = stores(place.uri)
    store.join_overflow()
    (url,), _ = store.put([source(noise(3 * CHUNK))])
    elsewhere = Directory(tmp_path / "elsewhere")
    elsewhere.path.mkdir()
    other = stores(elsewhere.uri, node="cd" * 28)
    with pytest.raises(OverflowUnavailableError, match="not the one that the session's other"):
        other.join_overflow()
    urls, failure = other.put([source(b"x" * 3 * CHUNK)])
    assert urls == []
    assert isinstance(failure, OverflowUnavailableError)
    with pytest.raises(OverflowUnavailableError, match="not the one that the session's other"):
        other.find(url, f"{0:056x}")
    with pytest.raises(OverflowUnavailableError, match="no overflow_uri"):
        stores(None, node="ef" * 28).find(url, f"{0:056x}")
    assert elsewhere.files() == {}
    assert get(store, url) == noise(3 * CHUNK)
    third = stores(place.uri, node="01" * 28)
    third.join_overflow()
    assert get(third, url) == noise(3 * CHUNK)


def test_spills_return_to_valkey_once_there_is_room_there(
    server: Server, stores: Any, place: Place_
) -> None:
    for room in ("budget", "memory"):
        store = stores(place.uri, max_bytes=None if room == "memory" else 0)
        if room == "memory":
            server.client.config_set("maxmemory", 1)
        (old,), _ = store.put([source(noise(3 * CHUNK))])
        assert old.startswith("overflow:")
        if room == "memory":
            server.client.config_set("maxmemory", 0)
        else:
            store = stores(place.uri, max_bytes=10 * MIB)
        (new,), _ = store.put([source(noise(3 * CHUNK, 1))])
        assert not new.startswith("overflow:")
        assert get(store, old) == noise(3 * CHUNK)
        assert get(store, new) == noise(3 * CHUNK, 1)
        store.delete([old, new])
        assert place.files().keys() == _signatures(place)


def test_a_probe_and_the_last_destroy_leave_nothing(stores: Any, place: Place_) -> None:
    first, second = stores(place.uri), stores(place.uri, node="cd" * 28)
    first.probe_overflow()
    assert place.is_empty()
    for store in (first, second):
        store.renew_lease("127.0.0.1:1", lambda: False)
        store.join_overflow()
        store.put([source(noise(3 * CHUNK, i), i) for i in range(3)])
    assert first.destroy(is_alive) == 3
    assert len(_signatures(place)) == 1
    assert second.destroy(is_alive) == 3
    assert place.is_empty()


def test_what_a_server_forgot_is_agreed_on_anew(server: Server, stores: Any, place: Place_) -> None:
    first, second = stores(place.uri), stores(place.uri, node="cd" * 28)
    nodes = (first, second)
    first.join_overflow()
    (url,), _ = first.put([source(noise(3 * CHUNK))])
    server.client.delete(first.keys.overflows)
    for store in reversed(nodes):
        store.renew_lease("127.0.0.1:1", lambda: False)
        store.join_overflow()
    assert get(second, url) == noise(3 * CHUNK)
    assert len(_signatures(place)) == 1
    assert [store.destroy(is_alive) for store in nodes] == [1, 0]
    assert place.is_empty()


def test_what_is_put_after_a_session_was_destroyed_is_refused(stores: Any, tmp_path: Path) -> None:
    place = Directory(tmp_path / "overflow")
    store, other = stores(place.uri), stores(place.uri)
    for each in (store, other):
        each.delete(each.put([source(noise(3 * CHUNK))])[0])
    assert store.destroy(is_alive) == 0
    urls, failure = other.put([source(noise(3 * CHUNK))])
    assert urls == []
    assert isinstance(failure, OverflowUnavailableError)
    assert place.is_empty()


def test_a_deletion_and_a_look_after_a_session_was_destroyed_bring_nothing_back(
    server: Server, stores: Any, place: Place_
) -> None:
    """Ray destroys a session while its IO workers work on. These have not used the overflow yet."""
    store, deleting, looking = (stores(place.uri) for _ in range(3))
    urls, _ = store.put([source(noise(3 * CHUNK), i) for i in range(2)])
    assert store.destroy(is_alive) == 2
    for _ in range(2):
        with pytest.raises(OverflowUnavailableError):
            deleting.delete(urls)
        with pytest.raises(OverflowUnavailableError):
            looking.find(urls[0], f"{0:056x}")
        assert server.our_keys() == []
        assert place.is_empty()


# --- recovery ---


def test_an_overflow_that_is_away_holds_up_nothing_in_valkey(
    server: Server, stores: Any, tmp_path: Path
) -> None:
    place = Directory(tmp_path / "share")
    store = stores(place.uri)
    store.put([source(noise(3 * CHUNK))])
    place.path.rename(tmp_path / "away")
    place.path.mkdir()
    node, other = store.node, stores(place.uri)
    with contextlib.closing(link_to(Config.load({"url": server.url}, {}))) as link:
        ledger = Ledger(link, store.keys)
        dead = ledger.reservation(node, "999999-dead", Grant(0, 0), 100, 100, None, None)
        link.execute(dead)
        assert "999999-dead" in ledger.grants_of(node)
        other.recover(is_alive)
        assert "999999-dead" not in ledger.grants_of(node)
        with pytest.raises(OverflowUnavailableError):
            other.sweep_overflow(is_alive)


def test_what_killed_writers_left_is_looked_for_until_the_overflow_is_there(
    stores: Any, tmp_path: Path
) -> None:
    place, away = Directory(tmp_path / "share"), Directory(tmp_path / "away")
    first = stores(place.uri)
    (url,), _ = first.put([source(noise(3 * CHUNK))])
    (file,) = place.files().keys() - _signatures(place)
    place.write(f"{file}.part", b"half")
    place.path.rename(away.path)
    place.path.mkdir()
    store = stores(place.uri)
    for _ in range(2):
        with pytest.raises(OverflowUnavailableError, match="not the one that the session's other"):
            store.sweep_overflow(is_alive)
    place.path.rmdir()
    away.path.rename(place.path)
    size = store.sweep_overflow(is_alive)
    assert place.files().keys() == {file} | _signatures(place)
    assert size == place.files()[file]
    assert get(first, url) == noise(3 * CHUNK)


# --- with Ray ---


@pytest.mark.slow
def test_ray_has_several_times_the_servers_memory_back_and_leaves_nothing(place: Place_) -> None:
    """Both tiers, and with the last reference all of an object is gone from either."""
    size, count = (8 * MIB, 30) if isinstance(place, Directory) else (4 * MIB, 50)
    with valkey_server(maxmemory="64mb") as server:
        server.settle_foreign()
        with local_ray(server.url, overflow_uri=place.uri):
            refs = [ray.put(np.frombuffer(noise(size, i), np.uint8)) for i in range(count)]
            for i, ref in enumerate(refs):
                assert ray.get(ref).tobytes() == noise(size, i)
            assert server.spilled_ids()
            wait_until(lambda: len(place.files()) > 10)
            del refs, ref
            expect_no_keys(server)
            wait_until(lambda: place.files().keys() == _signatures(place))
        wait_until(lambda: server.our_keys() == [])
        wait_until(place.is_empty)
