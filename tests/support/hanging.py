"""A directory that can stand still, or fail, as a share whose server is away: a FUSE file system.

It passes on what is asked to another directory, keeps it waiting, or answers with an error. It
speaks the kernel's own protocol (linux/fuse.h) over /dev/fuse, so that it needs the right to mount
and no library.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

_REQUEST = struct.Struct("<IIQQIIII")
_REPLY = struct.Struct("<IiQ")
_MOST_WRITTEN = 128 << 10
_DIRECT_IO = 1  # past the page cache: every read and write is asked for
_TRUNCATES = 1 << 3
_PARENT_DEATH_SIGNAL = 1  # of prctl(2)


class Op(IntEnum):
    """What is asked of a file system; all that is not here is refused."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    OPEN = 14
    READ = 15
    WRITE = 16
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    CREATE = 35
    INTERRUPT = 36
    BATCH_FORGET = 42


_WITHOUT_REPLY = {Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT}
# What is closed is closed behind the share too, whether it fails or not.
_NEVER_FAIL = {Op.INIT, Op.RELEASE, Op.RELEASEDIR}


class HangingDirectory:
    """A directory mounted at `path`, whose files are in `behind`, where nothing hangs.

    A process of its own serves it: one that waits for it cannot be killed before it has its answer,
    and so must not be the one that answers.

    Raises:
        OSError: without /dev/fuse, or the right to mount.
    """

    def __init__(self, path: Path, behind: Path) -> None:
        self.path, self.behind = path, behind
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(path), str(behind)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if self._answer() != "mounted":
            self._process.wait()
            raise OSError("cannot mount")

    @property
    def held(self) -> list[Op]:
        """What was asked and waits, in order."""
        return [Op[name] for name in self._tell("held").split()]

    def hang(self, *ops: Op) -> None:
        """Keep what is asked from now on waiting: `ops`, or everything."""
        self._tell(f"hang {' '.join(op.name for op in ops or Op)}")

    def fail(self) -> None:
        """Answer everything with an error (EIO) from now on."""
        self._tell("fail yes")

    @property
    def refused(self) -> int:
        """How many errors `fail` has answered with so far."""
        return int(self._tell("refused"))

    def go_on(self) -> None:
        """Do what was asked meanwhile, and all that follows."""
        self._tell("fail")
        self._tell("hang")

    def close(self) -> None:
        self.go_on()
        subprocess.run(["umount", "-l", str(self.path)], check=True)
        self._process.kill()
        self._process.communicate()

    def _tell(self, command: str) -> str:
        assert self._process.stdin
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()


class _Server:
    """What answers the kernel, and whoever has started it."""

    def __init__(self, path: Path, behind: Path) -> None:
        self.behind = behind
        self._held: list[bytes] = []
        self._hanging: set[Op] = set()
        self._is_failing, self._refused = False, 0
        self._paths = {1: "."}
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        self._device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other"
        if libc.mount(b"hanging", os.fsencode(path), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), "cannot mount")

    def serve(self) -> None:
        print("mounted", flush=True)
        waiting = select.poll()
        for file in (self._device, sys.stdin.fileno()):
            waiting.register(file, select.POLLIN)
        while True:
            for file, _ in waiting.poll():
                if file != self._device:
                    self._obey(sys.stdin.readline().split())
                elif (request := self._next_request()) is not None:
                    if _op(request) in self._hanging - _WITHOUT_REPLY:
                        self._held.append(request)
                    else:
                        self._answer(request)

    def _obey(self, words: list[str]) -> None:
        if not words:
            sys.exit()
        if words[0] == "refused":
            print(self._refused, flush=True)
            return
        if words[0] == "fail":
            self._is_failing = len(words) > 1
        if words[0] == "hang":
            self._hanging = {Op[name] for name in words[1:]}
            held, self._held = self._held, []
            for request in held:
                if _op(request) in self._hanging:
                    self._held.append(request)
                else:
                    self._answer(request)
        print(*(op.name for op in map(_op, self._held) if op), flush=True)

    def _next_request(self) -> bytes | None:
        try:
            return os.read(self._device, _MOST_WRITTEN + 4096)
        except OSError as error:
            if error.errno == errno.ENODEV:
                # Unmounted. Whoever has started this ends it.
                signal.pause()
            return None  # whoever asked was killed

    def _answer(self, request: bytes) -> None:
        _, op, unique, node, *_ = _REQUEST.unpack_from(request)
        if op in _WITHOUT_REPLY:
            return
        error, reply = 0, b""
        try:
            if op not in [*Op]:
                raise OSError(errno.ENOSYS, "not here")
            if self._is_failing and op not in _NEVER_FAIL:
                self._refused += 1
                raise OSError(errno.EIO, "fails")
            handle = getattr(self, f"_{Op(op).name.lower()}")
            reply = handle(self._paths.get(node, "gone"), request[_REQUEST.size :])
        except OSError as failure:
            error = failure.errno or errno.EIO
        with contextlib.suppress(FileNotFoundError):  # whoever asked was killed
            size = _REPLY.size + len(reply)
            os.write(self._device, _REPLY.pack(size, -error, unique) + reply)

    def _at(self, path: str) -> Path:
        return self.behind / path

    def _below(self, path: str, name: bytes) -> str:
        return os.path.normpath(os.path.join(path, os.fsdecode(name.partition(b"\0")[0])))

    def _attributes(self, path: str) -> bytes:
        found = self._at(path).lstat()
        times = (int(found.st_atime), int(found.st_mtime), int(found.st_ctime), 0, 0, 0)
        return struct.pack(
            "<6Q10I",
            *(found.st_ino, found.st_size, found.st_blocks, *times),
            *(found.st_mode, found.st_nlink, 0, 0, 0, 4096, 0),
        )

    def _entry(self, path: str) -> bytes:
        attributes = self._attributes(path)
        node = next((n for n, known in self._paths.items() if known == path), len(self._paths) + 1)
        self._paths[node] = path
        return struct.pack("<4QII", node, 0, 0, 0, 0, 0) + attributes

    def _opened(self, path: str, flags: int, mode: int = 0o644) -> bytes:
        file = os.open(self._at(path), flags & (os.O_ACCMODE | os.O_CREAT | os.O_TRUNC), mode)
        return struct.pack("<QII", file, _DIRECT_IO, 0)

    def _init(self, path: str, data: bytes) -> bytes:
        return struct.pack("<IIIIHHIIHHI7I", 7, 31, 0, 0, 0, 0, _MOST_WRITTEN, 1, *[0] * 10)

    def _lookup(self, path: str, data: bytes) -> bytes:
        return self._entry(self._below(path, data))

    def _getattr(self, path: str, data: bytes) -> bytes:
        return struct.pack("<QII", 0, 0, 0) + self._attributes(path)

    def _setattr(self, path: str, data: bytes) -> bytes:
        valid, _, _, size = struct.unpack_from("<IIQQ", data)
        if valid & _TRUNCATES:
            os.truncate(self._at(path), size)
        return self._getattr(path, data)

    def _mkdir(self, path: str, data: bytes) -> bytes:
        self._at(below := self._below(path, data[8:])).mkdir()
        return self._entry(below)

    def _unlink(self, path: str, data: bytes) -> bytes:
        self._at(self._below(path, data)).unlink()
        return b""

    def _rmdir(self, path: str, data: bytes) -> bytes:
        self._at(self._below(path, data)).rmdir()
        return b""

    def _rename(self, path: str, data: bytes) -> bytes:
        (directory,) = struct.unpack_from("<Q", data)
        old_name, new_name, _ = data[8:].split(b"\0")
        old, new = self._below(path, old_name), self._below(self._paths[directory], new_name)
        os.rename(self._at(old), self._at(new))
        for node, known in self._paths.items():
            if known == old or known.startswith(f"{old}/"):
                self._paths[node] = f"{new}{known[len(old) :]}"
        return b""

    def _open(self, path: str, data: bytes) -> bytes:
        return self._opened(path, *struct.unpack_from("<I", data))

    def _create(self, path: str, data: bytes) -> bytes:
        flags, mode = struct.unpack_from("<II", data)
        below = self._below(path, data[16:])
        opened = self._opened(below, flags | os.O_CREAT, mode)
        return self._entry(below) + opened

    def _read(self, path: str, data: bytes) -> bytes:
        file, offset, size = struct.unpack_from("<QQI", data)
        return os.pread(file, size, offset)

    def _write(self, path: str, data: bytes) -> bytes:
        file, offset, size = struct.unpack_from("<QQI", data)
        return struct.pack("<II", os.pwrite(file, data[40 : 40 + size], offset), 0)

    def _flush(self, path: str, data: bytes) -> bytes:
        return b""

    def _release(self, path: str, data: bytes) -> bytes:
        (file,) = struct.unpack_from("<Q", data)
        os.close(file)
        return b""

    def _opendir(self, path: str, data: bytes) -> bytes:
        return struct.pack("<QII", 0, 0, 0)

    def _readdir(self, path: str, data: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", data)
        reply = b""
        for number, name in enumerate(sorted(os.listdir(self._at(path))), 1):
            encoded = os.fsencode(name)
            entry = struct.pack("<QQII", 1, number, len(encoded), 0) + encoded
            entry += bytes(-len(entry) % 8)
            if number <= offset:
                continue
            if len(reply) + len(entry) > size:
                break
            reply += entry
        return reply

    def _releasedir(self, path: str, data: bytes) -> bytes:
        return b""


def _op(request: bytes) -> Op | None:
    _, op, *_ = _REQUEST.unpack_from(request)
    return Op(op) if op in [*Op] else None


@contextlib.contextmanager
def hanging_directory(parent: Path) -> Iterator[HangingDirectory]:
    """One below `parent`.

    Raises:
        OSError: without /dev/fuse, or the right to mount.
    """
    path, behind = parent / "share", parent / "behind"
    for directory in (path, behind):
        directory.mkdir()
    share = HangingDirectory(path, behind)
    try:
        yield share
    finally:
        share.close()


def can_hang() -> bool:
    """Whether a `hanging_directory` can be had here."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            with hanging_directory(Path(directory)):
                return True
        except OSError:
            return False


if __name__ == "__main__":
    _Server(Path(sys.argv[1]), Path(sys.argv[2])).serve()
