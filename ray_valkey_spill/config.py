"""Parameters: their names, defaults and checks. Pure: opens no file and no connection.

A parameter comes from the spilling config, else from `RAY_VALKEY_SPILL_<NAME>`, else it has its
default. The password is not a parameter: Ray puts the spilling config on the command line of its IO
workers, where everyone on the machine can read it. So the password comes from
`RAY_VALKEY_SPILL_PASSWORD`, from `password_file`, or from a url in the environment.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from ray_valkey_spill.errors import ConfigError
from ray_valkey_spill.units import KIB, MIB, parse_size

__all__ = [
    "ENV_PREFIX",
    "MIN_CHUNK_SIZE",
    "NAMESPACE_PATTERN",
    "Address",
    "Config",
    "Endpoint",
    "Parameter",
    "check_params",
    "json_kind",
    "json_text",
    "parameters",
]

ENV_PREFIX = "RAY_VALKEY_SPILL_"
_NOT_PARAMETERS = {"DISABLE", "PASSWORD"}
# Other empty variables count as not set. If these did, data would go elsewhere, or unsealed.
_NEVER_EMPTY = {"url", "encryption_key_file"}
# Kubernetes sets these in every pod for each Service of its namespace; a Service's name may begin
# as our variables do.
_SERVICE_LINK = re.compile(r"[A-Z0-9_]*(SERVICE_(HOST|PORT)|PORT)(_[A-Z0-9_]*)?")

MIN_CHUNK_SIZE = 1 * KIB
MAX_CHUNK_SIZE = 8 * MIB
_LARGEST = 2**63 - 1  # bytes, as servers count them

# A key is part of Ray's `base?offset=N&size=M` and of Valkey's glob patterns (ACLs), and ":"
# separates its parts. A namespace ends at the first ":".
_PREFIX_PATTERN = re.compile(r"ray:[A-Za-z0-9_.:@-]*")
NAMESPACE_PATTERN = re.compile(r"[A-Za-z0-9_.@-]{1,128}")
_OVERFLOW_PATTERN = re.compile(r"/[^\x00-\x1f]*|file:///\S*|(s3|gs|gcs|abfss?|hdfs|viewfs)://\S+")
_PORT, _SENTINEL_PORT = 6379, 26379

_TLS_SCHEMES = ("valkeys", "rediss")
_SCHEMES = ("valkey", "redis", *_TLS_SCHEMES, "unix")


# --- kinds of parameters ---


@dataclass(frozen=True, slots=True)
class _Kind:
    """Describes the values of all parameters of a kind.

    Attributes:
        expected: describes a valid value; an error quotes it.
        check: returns a value from JSON as the config stores it; raises ValueError.
        metavar: stands for the value in the help of the command line.
        from_text: returns the JSON value that text stands for; raises ValueError.
        choices: all valid texts, if they are few.
    """

    expected: str
    check: Callable[[Any], Any]
    metavar: str
    from_text: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()


def _string(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError
    return value


def _path(value: Any) -> str:
    """As `_string`, for what names a file; raises a ValueError for other text."""
    os.fsencode(_string(value))
    return str(value)


def _utf8(value: Any) -> str:
    """As `_string`, for what a server or pyarrow takes; raises a ValueError for other text."""
    _string(value).encode()
    return str(value)


def _integer(low: int, high: float) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError
        return value

    return check


def _size(low: int, high: float) -> Callable[[Any], int]:
    in_range = _integer(low, high)
    return lambda value: in_range(parse_size(value) if isinstance(value, str) else value)


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    try:
        seconds = float(value)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError
    return seconds


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _boolean_text(text: str) -> bool:
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if (value := known.get(text.strip().lower())) is None:
        raise ValueError
    return value


def _matching(pattern: re.Pattern[str]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not pattern.fullmatch(_utf8(value)):
            raise ValueError
        return str(value)

    return check


def _one_of(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError
        return str(value)

    return check


_CODECS = ("auto", "lz4", "none")

_STRING = _Kind("a non-empty string", _utf8, "NAME")
_URL = _Kind("a non-empty string", _string, "URL")
_FILE = _Kind("a non-empty string", _path, "FILE")
_BOOLEAN = _Kind(
    "true or false", _boolean, "[true|false]", _boolean_text, choices=("true", "false")
)
_COUNT = _Kind("a whole number, 0 or more", _integer(0, math.inf), "NUMBER", int)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: its name, default, meaning and kind."""

    name: str
    default: Any
    meaning: str
    kind: _Kind

    @property
    def is_file(self) -> bool:
        """Whether a value is the path of a file."""
        return self.kind is _FILE

    def check(self, value: Any, called: str) -> Any:
        """Return `value` as the config stores it; `called` is the parameter's name in an error."""
        try:
            return self.kind.check(value)
        except ValueError:
            raise ConfigError(_ill_typed(called, self.kind, value)) from None

    def from_text(self, text: str, called: str) -> Any:
        """Return the value that `text`, from the environment or a command line, stands for."""
        try:
            return self.kind.from_text(text)
        except ValueError:
            raise ConfigError(_ill_typed(called, self.kind, text)) from None


def _parameter(default: Any, kind: _Kind, meaning: str) -> Any:
    return field(default=default, metadata={"kind": kind, "meaning": meaning})


class Endpoint(NamedTuple):
    """Where one server listens: `host` and `port`, or the `path` of a unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return self.path
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed `url`: servers, a cluster's nodes or Sentinels, and how to connect to them."""

    endpoints: tuple[Endpoint, ...] = (Endpoint("127.0.0.1", _PORT),)
    tls: bool = False
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        first = self.endpoints[0]
        if first.path:
            return f"unix://{first.path}" + (f"?db={self.db}" if self.db else "")
        hosts = ",".join(map(str, self.endpoints))
        return f"valkey{'s' if self.tls else ''}://{hosts}/{self.db}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All parameters, checked, and the address parsed from `url`. Made by `Config.load`.

    Only `address.password` is secret, and no repr shows it.
    """

    url: str = _parameter(
        "valkey://127.0.0.1:6379/0",
        _URL,
        "valkey://host:port/db, valkeys://… (TLS) or unix:///path?db=N; "
        "several host:port, with commas, for a cluster or Sentinels",
    )
    sentinel_service: str | None = _parameter(
        None,
        _STRING,
        "the hosts in url are Sentinels; ask them for this service's primary",
    )
    namespace: str = _parameter(
        "default",
        _Kind(
            "1 to 128 letters, digits or any of _ . @ - (no ':')",
            _matching(NAMESPACE_PATTERN),
            "NAME",
        ),
        "separates Ray clusters that share a server",
    )
    key_prefix: str = _parameter(
        "ray:spill:",
        _Kind(
            "a prefix that begins with 'ray:' and has only letters, digits and _ . : @ -",
            _matching(_PREFIX_PATTERN),
            "PREFIX",
        ),
        "every key begins with it; must begin with ray:",
    )
    # jemalloc rounds a value of exactly 2^k bytes up to the next size class, a quarter more. With
    # 128 bytes to spare, payload and allocation headers stay below the power of two.
    chunk_size: int = _parameter(
        512 * KIB - 128,
        _Kind(
            f"a size from {MIN_CHUNK_SIZE} to {MAX_CHUNK_SIZE} bytes, such as 524160 or 256KiB",
            _size(MIN_CHUNK_SIZE, MAX_CHUNK_SIZE),
            "BYTES",
            parse_size,
        ),
        "bytes of an object per key",
    )
    compression: str = _parameter(
        "auto",
        _Kind(
            "'auto', 'lz4' or 'none'", _one_of(*_CODECS), f"[{'|'.join(_CODECS)}]", choices=_CODECS
        ),
        "auto samples and stores incompressible data as it is",
    )
    max_bytes: int | None = _parameter(
        None,
        _Kind(
            "a size in bytes, 0 or more, such as 536870912, 400MiB or 2GB",
            _size(0, _LARGEST),
            "BYTES",
            parse_size,
        ),
        "how much of the server the namespace may take, in bytes as stored, evicting others' keys "
        "that have a TTL if need be; without it spilling takes free memory only",
    )
    overflow_uri: str | None = _parameter(
        None,
        _Kind(
            "an absolute path, or a URI of pyarrow.fs such as s3://bucket/path",
            _matching(_OVERFLOW_PATTERN),
            "URI",
        ),
        "a directory or pyarrow.fs URI that every node reaches; takes what Valkey has no room for",
    )
    allow_eviction: bool = _parameter(
        False, _BOOLEAN, "accept a server whose policy may evict spilled chunks"
    )
    min_replicas: int = _parameter(
        0, _COUNT, "replicas that must have a spill before it is reported as done (WAIT)"
    )
    wait_aof: bool = _parameter(
        False,
        _BOOLEAN,
        "the primary and min_replicas must have a spill in their append-only files too (WAITAOF)",
    )
    retry_timeout: float = _parameter(
        30.0,
        _Kind("a number of seconds, 0 or more", _seconds, "SECONDS", float),
        "seconds for which a broken connection or a loading server is retried",
    )
    tls_ca_file: str | None = _parameter(
        None, _FILE, "TLS: a file with the CA that signed the server's certificate"
    )
    tls_cert_file: str | None = _parameter(None, _FILE, "TLS: a file with the client's certificate")
    tls_key_file: str | None = _parameter(
        None, _FILE, "TLS: a file with the key of the client's certificate"
    )
    username: str | None = _parameter(None, _STRING, "ACL user")
    password_file: str | None = _parameter(None, _FILE, "a file with the ACL user's password")
    encryption_key_file: str | None = _parameter(
        None, _FILE, "a file with keys that seal all that is spilled (AES-256-GCM)"
    )
    address: Address = field(default_factory=Address)

    @classmethod
    def load(
        cls,
        params: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
        *,
        called: Mapping[str, str] = MappingProxyType({}),
    ) -> Config:
        """Check `params` and the environment.

        Args:
            params: the spilling config's parameters, as JSON gives them. A `None` value counts as
                not given. Sizes may be text with a unit: see `units.parse_size`.
            environ: the environment; `os.environ` unless a test passes its own.
            called: names for errors, by parameter, where the user gave it by another name.

        Raises:
            ConfigError: names the parameter and the nearest valid name, or describes a valid value.
        """
        environ = os.environ if environ is None else environ
        address, checked, names = _check_each(params or {}, environ, called)
        _refuse_contradictions(address, checked, names)
        _require_partners(checked, names)
        username = checked.get("username")
        password = _password_in(environ) or address.password
        address = replace(address, username=username or address.username, password=password)
        return cls(**{**checked, "url": str(address), "address": address})


_PARAMETERS = {
    f.name: Parameter(f.name, f.default, **f.metadata) for f in fields(Config) if f.metadata
}


def parameters() -> list[Parameter]:
    """All parameters, in the order of the documentation."""
    return list(_PARAMETERS.values())


def check_params(
    params: Mapping[str, Any], *, called: Mapping[str, str] = MappingProxyType({})
) -> Address:
    """Check a spilling config's parameters without the environment of the process that uses them.

    Checks each value, and that given parameters do not contradict each other. A parameter that is
    missing, such as a `valkeys://` url for `tls_ca_file`, may come from the environment:
    `Config.load` checks that, where the environment is known.

    Args:
        params: as for `Config.load`.
        called: as for `Config.load`.

    Returns:
        The address, as far as `params` give it.

    Raises:
        ConfigError: no environment can make these parameters valid.
    """
    address, checked, names = _check_each(params, {}, called)
    if "url" in checked:
        _refuse_contradictions(address, checked, names)
    return replace(address, username=checked.get("username") or address.username)


def json_kind(value: Any) -> str:
    """Describe a value of JSON, for an error that must not show the value itself."""
    if isinstance(value, bool):
        return "true or false"
    kinds = {str: "a string", int: "a number", float: "a number", list: "an array"}
    return kinds.get(type(value), "null" if value is None else "an object")


def json_text(value: Any) -> str:
    """Return `value` as JSON for an error, cut if it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # a number of very many digits, or deep nesting
        return json_kind(value)
    return f"{text[:57]}..." if len(text) > 60 else text


class _Names(dict[str, str]):
    """The user's name for each given parameter; any other parameter has its own name."""

    def __missing__(self, name: str) -> str:
        return name


def _check_each(
    params: Mapping[str, Any], environ: Mapping[str, str], called: Mapping[str, str]
) -> tuple[Address, dict[str, Any], _Names]:
    """Check each parameter by itself; returns the parsed url, the given values and their names."""
    values, names = _collect(params, environ, called)
    # First, so that no other error can quote a url with a password in it.
    address = _parse_url(
        values.get("url", _PARAMETERS["url"].default),
        names["url"],
        from_config=params.get("url") is not None,
        port=_SENTINEL_PORT if values.get("sentinel_service") else _PORT,
    )
    _refuse_credentials(values.get("overflow_uri"), names["overflow_uri"])
    checked = {name: _PARAMETERS[name].check(value, names[name]) for name, value in values.items()}
    return address, checked, names


def _collect(
    params: Mapping[str, Any], environ: Mapping[str, str], called: Mapping[str, str]
) -> tuple[dict[str, Any], _Names]:
    """The given values, and the user's name for each."""
    values: dict[str, Any] = {}
    names = _Names()
    for variable, text in environ.items():
        rest = variable.removeprefix(ENV_PREFIX)
        if rest == variable or rest in _NOT_PARAMETERS or _SERVICE_LINK.fullmatch(rest):
            continue
        name = variable[len(ENV_PREFIX) :].lower()
        if name not in _PARAMETERS or variable != variable.upper():
            raise ConfigError(_unknown(variable, [ENV_PREFIX + n.upper() for n in _PARAMETERS]))
        if text == "" and name not in _NEVER_EMPTY:
            continue
        values[name] = _PARAMETERS[name].from_text(text, variable)
        names[name] = variable
    for name, value in params.items():
        if name not in _PARAMETERS:
            if name in ("password", "passwd"):
                raise _password_refused("a password as a parameter")
            raise ConfigError(_unknown(name, list(_PARAMETERS)))
        if value is not None:
            values[name] = value
            names[name] = called.get(name, name)
    return values, names


def _password_in(environ: Mapping[str, str]) -> str | None:
    password = environ.get(f"{ENV_PREFIX}PASSWORD")
    try:
        return password and _utf8(password)
    except ValueError:
        # The error quotes the password.
        raise ConfigError(f"{ENV_PREFIX}PASSWORD is not valid UTF-8") from None


def _password_refused(what: str) -> ConfigError:
    return ConfigError(
        f"{what} is refused, because Ray puts the spilling config on the command lines of its "
        "workers, where every user of the machine can read it",
        "Set RAY_VALKEY_SPILL_PASSWORD in the environment of every node, or give password_file, "
        "the path of a file with the password",
    )


def _refuse_credentials(overflow_uri: Any, called: str) -> None:
    """No error shows the URI, since it may hold a secret."""
    parts = str(overflow_uri or "").partition("://")[2]
    authority, _, rest = parts.partition("/")
    if ":" in authority.rpartition("@")[0] or re.search(
        "[?&]([^=&]*(key|secret|token)[^=&]*|sig)=", rest, re.IGNORECASE
    ):
        raise ConfigError(
            f"credentials in {called} are refused, because Ray puts the spilling config on the "
            "command lines of its workers, and their messages name this URI",
            "Give them as the object store's own tools take them: by environment variables such "
            "as AWS_ACCESS_KEY_ID, by a file, or by the machine's role",
        )


def _unknown(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.5)
    if nearest:
        match = next(k for k in known if k.lower() == nearest[0])
        return f"unknown parameter {name!r}: did you mean {match!r}?"
    return f"unknown parameter {name!r}: expected one of {', '.join(known)}"


def _ill_typed(called: str, kind: _Kind, value: Any) -> str:
    return f"{called} must be {kind.expected}, not {json_text(value)}"


_AS_IPV6 = "as in valkey://[::1]:6379/0"


def _parse_url(url: Any, called: str, *, from_config: bool, port: int) -> Address:
    """Parse `url`. No error shows it, since it may hold a password."""
    if not isinstance(url, str) or not url:
        shown = "an empty one" if url == "" else json_kind(url)
        raise ConfigError(f"{called} must be {_URL.expected}, not {shown}")
    try:
        parts, hosts = _split(_utf8(url))
        has_password = parts.password is not None
    except ValueError:
        # The error quotes the url, which may hold a password.
        raise ConfigError(
            f"{called} cannot be parsed",
            "Percent-encode every character of its user name and password but letters and digits, "
            f"and give an IPv6 address in brackets, {_AS_IPV6}",
        ) from None
    if has_password and from_config:
        raise _password_refused(f"a password in {called}")
    if "@" in f"{parts.path}{parts.query}{parts.fragment}":
        # A "/", "?" or "#" in a password ends the host part early, and the rest lands there.
        raise ConfigError(
            f"{called} has an '@' behind its host", "Percent-encode its user name and password"
        )
    scheme = parts.scheme
    if scheme not in _SCHEMES:
        allowed = f"{called} must begin with valkey://, valkeys://, redis://, rediss:// or unix://"
        raise ConfigError(
            f"{allowed}, not with {scheme + '://'!r}"
            if "://" in url
            else f"{allowed}, as in valkey://host:6379/0"
        )
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = set(query) - ({"db"} if scheme == "unix" else set())
    if unknown or parts.fragment:
        raise ConfigError(
            f"{called} has options behind {'?' if unknown else '#'}, and takes none: give them as "
            f"parameters ({', '.join(_PARAMETERS)})"
        )
    return Address(
        endpoints=(
            (_socket(parts, called),) if scheme == "unix" else _endpoints(hosts, called, port)
        ),
        tls=scheme in _TLS_SCHEMES,
        db=_database(
            query.get("db", "0") if scheme == "unix" else parts.path.strip("/") or "0", called
        ),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
    )


def _split(url: str) -> tuple[SplitResult, list[str]]:
    """Return the parts of `url` with its first host alone, and all its hosts with their ports.

    `urlsplit` would refuse the others from Python 3.14 on, if they have brackets.

    Raises:
        ValueError: it cannot be parsed.
    """
    scheme, slashes, rest = url.partition("//")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    user, at, hosts = authority.rpartition("@")
    first, *others = hosts.split(",")
    behind = rest[len(authority) :]
    return urlsplit(f"{scheme}{slashes}{user}{at}{first}{behind}"), [first, *others]


def _socket(parts: SplitResult, called: str) -> Endpoint:
    # The first component of unix://name/... would be parsed as a host.
    if parts.netloc.rpartition("@")[2] or not parts.path:
        raise ConfigError(
            f"{called} of a unix socket needs an absolute path, as in unix:///run/valkey.sock"
        )
    return Endpoint(path=unquote(parts.path))


def _endpoints(hosts: list[str], called: str, default_port: int) -> tuple[Endpoint, ...]:
    endpoints = []
    for text in hosts:
        try:
            one = urlsplit(f"//{text}")
            host, port = one.hostname, one.port
        except ValueError:
            if "[" in text or text.count(":") > 1:
                raise ConfigError(
                    f"an IPv6 address in {called} needs brackets, {_AS_IPV6}"
                ) from None
            raise ConfigError(f"a port in {called} must be a number from 1 to 65535") from None
        if not host or port == 0:
            raise ConfigError(
                f"{called} must name a host and a port, as in valkey://host:6379/0, or several, "
                "with commas between them, of a cluster or of Sentinels"
            )
        endpoints.append(Endpoint(host, port or default_port))
    return tuple(endpoints)


def _refuse_contradictions(address: Address, values: Mapping[str, Any], names: _Names) -> None:
    """Refuse parameters that cannot be used with the url that `address` was parsed from."""
    given = [name for name in values if name.startswith("tls_")]
    if given and not address.tls:
        raise ConfigError(
            f"{names[given[0]]} is given, but {names['url']} does not use TLS",
            f"Use valkeys:// in {names['url']}",
        )
    if values.get("sentinel_service") and address.endpoints[0].path:
        raise ConfigError(
            f"{names['sentinel_service']} is given, but {names['url']} names a unix socket",
            "Give the Sentinels' hosts, as in valkey://host1:26379,host2:26379/0",
        )
    username = values.get("username")
    if username and address.username and username != address.username:
        raise ConfigError(
            f"{names['username']} is {username!r}, but {names['url']} names the user "
            f"{address.username!r}: give one of them"
        )


def _require_partners(values: Mapping[str, Any], names: _Names) -> None:
    """Refuse a parameter that needs another one that is missing."""
    for name, other in (("tls_cert_file", "tls_key_file"), ("tls_key_file", "tls_cert_file")):
        if name in values and other not in values:
            raise ConfigError(f"{names[name]} is given without {other}", "Give both or none")


def _database(text: str, called: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ConfigError(f"the database in {called} must be a number, as in valkey://host:6379/0")
    return int(text)
