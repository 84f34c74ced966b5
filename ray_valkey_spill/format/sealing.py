"""Sealing: AES-256-GCM over what is stored, and the file that its keys are in. Knows no server.

Every attempt to spill an object has a key of its own, which follows from a key of the file and the
name of the object's header key. That name has namespace, session, node, object, attempt and count
of chunks, so what is stored under it opens there and nowhere else: not elsewhere on the server, nor
as what a later attempt stored. A nonce tells what a value is, the header or chunk i, so none opens
in the place of another. The header tells the sizes, and is sealed too.

So a nonce is a counter, and that is safe only where nothing else is ever sealed for the same name
and place. Names are unique per attempt (`names.new_attempt`): what is put again, in the overflow
too, is put under a new name, and what is sent again over a new connection are the same bytes.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import ConfigError, LostObjectError

__all__ = ["TAG_SIZE", "Key", "KeyRing", "Seal"]

_Buffer = bytes | bytearray | memoryview

TAG_SIZE = 16
_KEY_SIZE = 32
# What the file's keys are used for, each apart from the other.
_FOR_ID, _FOR_OBJECT = b"ray-valkey-spill 1 key id", b"ray-valkey-spill 1 object "
_HEADER_NONCE = b"head" + bytes(8)
_HEX = re.compile(rb"[0-9A-Fa-f]{64}")
_HOW_TO_MAKE_ONE = (
    "Put one key on each line, 32 bytes as 64 hex digits or base64, as `openssl rand -hex 32` or "
    "`openssl rand -base64 32` print one; the first one seals, all of them open"
)


class Seal:
    """Seals and opens the values of one attempt to spill one object. For any number of threads."""

    def __init__(self, key_id: int, subkey: bytes) -> None:
        self.key_id = key_id
        self._cipher = AESGCM(subkey)

    def __repr__(self) -> str:
        return f"<Seal with key {self.key_id:016x}>"

    def seal_chunk(self, number: int, data: _Buffer, target: memoryview) -> None:
        """Seal a chunk into `target`, which has `TAG_SIZE` bytes more. Releases the GIL."""
        self._cipher.encrypt_into(_chunk_nonce(number), data, None, target)

    def open_chunk(self, number: int, stored: _Buffer, target: memoryview) -> None:
        """Open a chunk into `target`, which has `TAG_SIZE` bytes less. Releases the GIL.

        `target` is written to before it is known whether the chunk is whole: if this raises, it may
        have bytes that an attacker chose.

        Raises:
            LostObjectError: this is not what was sealed as chunk `number` of this object.
        """
        self._open(_chunk_nonce(number), stored, b"", target)

    def seal_header(self, data: _Buffer, bound: _Buffer) -> bytearray:
        """Seal a header's stream, and what it is `bound` to without containing it."""
        sealed = bytearray(len(data) + TAG_SIZE)
        self._cipher.encrypt_into(_HEADER_NONCE, data, bound, sealed)
        return sealed

    def open_header(self, stored: _Buffer, bound: _Buffer) -> bytearray:
        """What was sealed.

        Raises:
            LostObjectError: this, or what it is `bound` to, is not what was sealed.
        """
        data = bytearray(max(0, len(stored) - TAG_SIZE))
        self._open(_HEADER_NONCE, stored, bound, data)
        return data

    def _open(
        self, nonce: bytes, stored: _Buffer, bound: _Buffer, target: bytearray | memoryview
    ) -> None:
        try:
            self._cipher.decrypt_into(nonce, stored, bound, target)
        except InvalidTag:
            raise LostObjectError("its seal is broken: this is not what was stored here") from None


class Key:
    """A key of the file. `id` tells it from others, and nothing of it."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.id = int.from_bytes(hmac.digest(secret, _FOR_ID, "sha256")[:8], "big")

    def __repr__(self) -> str:
        return f"<Key {self.id:016x}>"

    def seal(self, name: str) -> Seal:
        """That of the object whose header key is `name`."""
        return Seal(self.id, hmac.digest(self._secret, _FOR_OBJECT + name.encode(), "sha256"))


class KeyRing:
    """The keys of a file, of which the first seals and all open.

    The file is looked at before each use, and read where it has changed, so that keys can be
    rotated under running processes: also one that is taken out opens nothing any more. While the
    file cannot be read, nothing is sealed and nothing opened. For one thread.

    Args:
        path: of the file. It is not read before its first use.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._keys: Sequence[Key] = ()
        self._version: tuple[int, ...] | None = None

    @classmethod
    def of(cls, config: Config) -> KeyRing | None:
        path = config.encryption_key_file
        return None if path is None else cls(path)

    def current(self) -> Sequence[Key]:
        """All of them as they are now, the one that seals first.

        Raises:
            ConfigError: the file is missing, has no key, or something in it is none.
        """
        try:
            # Of before the reading, so that what is written meanwhile is seen the next time.
            version = _version(os.stat(self._path))
            if version != self._version:
                self._version = None
                self._keys = _parse(Path(self._path).read_bytes(), self._path)
                self._version = version
        except OSError as error:
            raise _unreadable(self._path, error) from None
        return self._keys

    def open_header(
        self, name: str, key_id: int, stored: _Buffer, bound: _Buffer
    ) -> tuple[Seal, bytearray]:
        """Open the header stored under the key `name`, which tells of a key with `key_id`.

        Where that key is not in the file, the object is not lost: the key may come, as in a
        rotation, or come back.

        Returns:
            What opens the object's chunks too, and what was sealed.

        Raises:
            LostObjectError: it is not what was sealed here.
            ConfigError: the key is not in the file; or as `current`.
        """
        known = {key.id: key for key in self.current()}
        if key_id not in known:
            self._version = None  # a file can change twice within a tick of its clock
            known = {key.id: key for key in self.current()}
        if key_id in known:
            seal = known[key_id].seal(name)
            return seal, seal.open_header(stored, bound)
        raise ConfigError(
            f"it is sealed with key {key_id:016x}, which is not in encryption_key_file "
            f"{self._path} (only {', '.join(f'{known_id:016x}' for known_id in known)})",
            "Add that key to the file on every node, below the first one; it is read again by "
            "itself",
        )


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _parse(content: bytes, path: str) -> list[Key]:
    """The keys in a file. No error tells what else is in it."""
    keys = []
    for number, line in enumerate(content.splitlines(), 1):
        text = line.partition(b"#")[0].strip()
        if text:
            secret = _secret(text)
            if secret is None:
                raise ConfigError(
                    f"line {number} of encryption_key_file {path} is no key", _HOW_TO_MAKE_ONE
                )
            keys.append(Key(secret))
    if not keys:
        raise ConfigError(f"encryption_key_file {path} has no key", _HOW_TO_MAKE_ONE)
    return keys


def _secret(text: bytes) -> bytes | None:
    """The key that `text` is, if it is one."""
    with contextlib.suppress(ValueError):
        if _HEX.fullmatch(text):
            return bytes.fromhex(text.decode())
        secret = base64.b64decode(text, validate=True)
        return secret if len(secret) == _KEY_SIZE else None
    return None


def _unreadable(path: str, error: OSError) -> ConfigError:
    if _secret(path.encode(errors="replace")) is not None:
        return ConfigError(
            "encryption_key_file is a key, and has to be the path of a file with keys",
            "Make a new key: this one has been on command lines",
        )
    return ConfigError(
        f"encryption_key_file {path} cannot be read: {error.strerror}",
        "Every node needs it, with the same keys, readable for the user that Ray runs as",
    )


def _chunk_nonce(number: int) -> bytes:
    return b"data" + number.to_bytes(8, "big")
