"""Sealing: AES-256-GCM over stored bytes, and the file with its keys. Knows no server.

Every attempt to spill an object has its own key, derived from a key of the file and the name of the
object's header key. That name contains the namespace, session, node, object, attempt and number of
chunks. So a value opens under its own name only: neither elsewhere on the server, nor in place of a
value of a later attempt. The nonce identifies a value as the header or as chunk i, so no value
opens in place of another. The header, which has the sizes, is sealed too.

A nonce is a counter, so no other bytes may ever be sealed with the same name and nonce. Names are
unique per attempt (`names.new_attempt`): an object that is put again, also in the overflow, gets a
new name, and a request that is sent again over a new connection has the same bytes.
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

__all__ = ["TAG_SIZE", "Key", "KeyRing", "Seal", "is_key", "key_in_place_of_its_file"]

_Buffer = bytes | bytearray | memoryview

TAG_SIZE = 16
_KEY_SIZE = 32
# Domain separation of the two uses of a key from the file.
_FOR_ID, _FOR_OBJECT = b"ray-valkey-spill 1 key id", b"ray-valkey-spill 1 object "
_HEADER_NONCE = b"head" + bytes(8)
# Whether AES-GCM writes to memory of the caller's: since cryptography 47. Ray's images have older
# ones, which other packages there need, and pay with two copies of each value.
_IS_IN_PLACE = hasattr(AESGCM, "encrypt_into")
_HEX = re.compile(rb"[0-9A-Fa-f]{64}")
_HOW_TO_MAKE_ONE = (
    "Put one key on each line, 32 bytes as 64 hex digits or base64, as `openssl rand -hex 32` or "
    "`openssl rand -base64 32` print one; the first key seals, all keys open"
)


class Seal:
    """Seals and opens the values of one attempt to spill one object. Thread-safe."""

    def __init__(self, key_id: int, subkey: bytes) -> None:
        self.key_id = key_id
        self._cipher = AESGCM(subkey)

    def __repr__(self) -> str:
        return f"<Seal with key {self.key_id:016x}>"

    def seal_chunk(self, number: int, data: _Buffer, target: memoryview) -> None:
        """Seal a chunk into `target`, which is `TAG_SIZE` bytes longer. Releases the GIL."""
        self._seal(_chunk_nonce(number), data, b"", target)

    def open_chunk(self, number: int, stored: _Buffer, target: memoryview) -> None:
        """Open a chunk into `target`, which is `TAG_SIZE` bytes shorter. Releases the GIL.

        AES-GCM writes `target` before it has checked the tag: if this raises, `target` may contain
        bytes that an attacker chose.

        Raises:
            LostObjectError: `stored` was not sealed as chunk `number` of this object.
        """
        self._open(_chunk_nonce(number), stored, b"", target)

    def seal_header(self, data: _Buffer, bound: _Buffer) -> bytearray:
        """Seal a header's stream, and authenticate `bound` with it (the associated data)."""
        sealed = bytearray(len(data) + TAG_SIZE)
        self._seal(_HEADER_NONCE, data, bound, sealed)
        return sealed

    def open_header(self, stored: _Buffer, bound: _Buffer) -> bytearray:
        """Return the header's stream.

        Raises:
            LostObjectError: `stored` or `bound` is not what was sealed.
        """
        data = bytearray(max(0, len(stored) - TAG_SIZE))
        self._open(_HEADER_NONCE, stored, bound, data)
        return data

    def _seal(
        self, nonce: bytes, data: _Buffer, bound: _Buffer, target: bytearray | memoryview
    ) -> None:
        if _IS_IN_PLACE:
            self._cipher.encrypt_into(nonce, data, bound, target)
        else:
            target[:] = self._cipher.encrypt(nonce, bytes(data), bytes(bound))

    def _open(
        self, nonce: bytes, stored: _Buffer, bound: _Buffer, target: bytearray | memoryview
    ) -> None:
        try:
            if _IS_IN_PLACE:
                self._cipher.decrypt_into(nonce, stored, bound, target)
            else:
                target[:] = self._cipher.decrypt(nonce, bytes(stored), bytes(bound))
        except InvalidTag:
            raise LostObjectError("its seal is broken: these bytes were not stored here") from None


class Key:
    """A key of the file. `id` distinguishes it from other keys, and reveals nothing about it."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.id = int.from_bytes(hmac.digest(secret, _FOR_ID, "sha256")[:8], "big")

    def __repr__(self) -> str:
        return f"<Key {self.id:016x}>"

    def seal(self, name: str) -> Seal:
        """Return the seal of the object with the header key `name`."""
        return Seal(self.id, hmac.digest(self._secret, _FOR_OBJECT + name.encode(), "sha256"))


class KeyRing:
    """The keys of a file: the first one seals, all of them open. Not thread-safe.

    Each use checks the file, and reads it again if it has changed. So keys can be rotated under
    running processes, and a removed key opens nothing any more. While the file cannot be read,
    nothing can be sealed or opened.

    Args:
        path: path of the file. It is not read before its first use.
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
        """Return all keys in the file now; the first one seals.

        Raises:
            ConfigError: the file cannot be read, has no key, or has a line that is not a key.
        """
        try:
            # Taken before the read, so that the next call sees a change made meanwhile.
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
        """Open the header stored under the key `name`, and sealed with the key `key_id`.

        An object is not lost while its key is not in the file: a rotation may not have reached this
        node yet, or the key may be restored.

        Returns:
            The seal, which also opens the object's chunks, and the header's stream.

        Raises:
            LostObjectError: `stored` was not sealed under this name.
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
            "Add that key to the file on every node, below the first one; the file is reloaded "
            "automatically",
        )


def key_in_place_of_its_file() -> ConfigError:
    """Return the error for a key that was given as the path of a file; it does not show the key."""
    return ConfigError(
        "encryption_key_file is a key, but must be the path of a file with keys",
        "Make a new key: this one has been on command lines",
    )


def is_key(text: str) -> bool:
    """Whether `text`, given as the path of a file with keys, is itself a key."""
    return _secret(text.encode(errors="replace")) is not None


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _parse(content: bytes, path: str) -> list[Key]:
    """Return the keys in a file. No error quotes the file's content."""
    keys = []
    for number, line in enumerate(content.splitlines(), 1):
        text = line.partition(b"#")[0].strip()
        if text:
            secret = _secret(text)
            if secret is None:
                raise ConfigError(
                    f"line {number} of encryption_key_file {path} is not a key", _HOW_TO_MAKE_ONE
                )
            keys.append(Key(secret))
    if not keys:
        raise ConfigError(f"encryption_key_file {path} has no key", _HOW_TO_MAKE_ONE)
    return keys


def _secret(text: bytes) -> bytes | None:
    """Return the key that `text` encodes; None if it is not a key."""
    with contextlib.suppress(ValueError):
        if _HEX.fullmatch(text):
            return bytes.fromhex(text.decode())
        secret = base64.b64decode(text, validate=True)
        return secret if len(secret) == _KEY_SIZE else None
    return None


def _unreadable(path: str, error: OSError) -> ConfigError:
    if is_key(path):
        return key_in_place_of_its_file()
    return ConfigError(
        f"encryption_key_file {path} cannot be read: {error.strerror}",
        "Every node needs it, with the same keys, readable by the user that Ray runs as",
    )


def _chunk_nonce(number: int) -> bytes:
    return b"data" + number.to_bytes(8, "big")
