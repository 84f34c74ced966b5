"""Parameters: their names, defaults and checks. Pure: nothing is opened or connected to.

A parameter comes from the spilling config, else from `RAY_VALKEY_SPILL_<NAME>`, else it has its
default. The password is no parameter: Ray puts the spilling config on the command line of its IO
workers, where everyone on the machine can read it, so it comes from `RAY_VALKEY_SPILL_PASSWORD`,
from `password_file`, or from a url that is itself taken from the environment.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from ray_valkey_spill.errors import ConfigError
from ray_valkey_spill.units import KIB, MIB

__all__ = [
    "ENV_PREFIX",
    "MIN_CHUNK_SIZE",
    "Address",
    "Config",
    "Endpoint",
    "Parameter",
    "check_params",
    "parameters",
]

ENV_PREFIX = "RAY_VALKEY_SPILL_"
_NOT_PARAMETERS = {"DISABLE", "PASSWORD"}
# What Kubernetes sets for a Service whose name begins as ours do, in every pod of its namespace.
_SERVICE_LINK = re.compile(r"[A-Z0-9_]*(SERVICE_(HOST|PORT)|PORT)(_[A-Z0-9_]*)?")

MIN_CHUNK_SIZE = 1 * KIB
MAX_CHUNK_SIZE = 8 * MIB

# Keys must survive inside Ray's `base?offset=N&size=M`, Valkey's glob patterns (ACLs), and our own
# separators; a namespace moreover must not contain the ":" that ends it.
_PREFIX_PATTERN = re.compile(r"ray:[A-Za-z0-9_.:@-]*")
_NAMESPACE_PATTERN = re.compile(r"[A-Za-z0-9_.@-]{1,128}")
_OVERFLOW_PATTERN = re.compile(r"/[^\x00-\x1f]*|file:///\S*|(s3|gs|gcs|abfss?|hdfs|viewfs)://\S+")
_PORT, _SENTINEL_PORT = 6379, 26379

_TLS_SCHEMES = ("valkeys", "rediss")
_SCHEMES = ("valkey", "redis", *_TLS_SCHEMES, "unix")


# --- kinds of parameters: what a value must be, from JSON or from an environment variable ---


@dataclass(frozen=True, slots=True)
class _Kind:
    expected: str
    check: Callable[[Any], Any]  # raises ValueError
    from_text: Callable[[str], Any] = str


def _string(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _integer(low: int, high: float) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError
        return value

    return check


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
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[
        text.strip().lower()
    ]


def _matching(pattern: re.Pattern[str]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ValueError
        return value

    return check


def _one_of(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError
        return str(value)

    return check


def _overflow_uri(value: Any) -> str:
    if not isinstance(value, str) or not _OVERFLOW_PATTERN.fullmatch(value):
        raise ValueError
    return value


_STRING = _Kind("a non-empty string", _string)
_BOOLEAN = _Kind("true or false", _boolean, _boolean_text)
_COUNT = _Kind("a whole number, 0 or more", _integer(0, math.inf), int)


@dataclass(frozen=True, slots=True)
class Parameter:
    """What there is to know of a parameter."""

    name: str
    default: Any
    meaning: str
    kind: _Kind

    def check(self, value: Any, called: str) -> Any:
        """`value` as the config takes it; `called` is what the user knows the parameter as."""
        try:
            return self.kind.check(value)
        except ValueError:
            raise ConfigError(_ill_typed(called, self.kind, value)) from None

    def from_text(self, text: str, called: str = "") -> Any:
        """The value that `text`, from the environment or a command line, stands for."""
        try:
            return self.kind.from_text(text)
        except (KeyError, ValueError):
            raise ConfigError(_ill_typed(called or self.name, self.kind, text)) from None


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
    """What `url` tells: servers, a cluster's nodes or Sentinels, and how to talk to them."""

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
    """All parameters, checked, and the address parsed from `url`. Make one with `Config.load`.

    Nothing in it but `address.password` is secret, and that is in no repr.
    """

    url: str = _parameter(
        "valkey://127.0.0.1:6379/0",
        _STRING,
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
        _Kind("1 to 128 letters, digits or any of _ . @ - (no ':')", _matching(_NAMESPACE_PATTERN)),
        "keeps Ray clusters that share a server apart",
    )
    key_prefix: str = _parameter(
        "ray:spill:",
        _Kind(
            "a prefix that begins with 'ray:' and has only letters, digits and _ . : @ -",
            _matching(_PREFIX_PATTERN),
        ),
        "what every key begins with; must begin with ray:",
    )
    # A value of exactly 2^k bytes costs the next jemalloc size class, a quarter more; payload and
    # allocation headers stay below the power of two with these 128 bytes to spare.
    chunk_size: int = _parameter(
        512 * KIB - 128,
        _Kind(
            f"a whole number of bytes from {MIN_CHUNK_SIZE} to {MAX_CHUNK_SIZE}",
            _integer(MIN_CHUNK_SIZE, MAX_CHUNK_SIZE),
            int,
        ),
        "bytes of an object per key",
    )
    compression: str = _parameter(
        "auto",
        _Kind("'auto', 'lz4' or 'none'", _one_of("auto", "lz4", "none")),
        "auto samples and stores incompressible data as it is",
    )
    max_bytes: int | None = _parameter(
        None,
        _Kind("a whole number of bytes, 0 or more", _integer(0, math.inf), int),
        "how much of the server the namespace may take, in bytes as they are stored, evicting keys "
        "of others that have a TTL if need be; without it spilling takes free memory only",
    )
    overflow_uri: str | None = _parameter(
        None,
        _Kind("an absolute path, or a URI of pyarrow.fs such as s3://bucket/path", _overflow_uri),
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
        "the primary and min_replicas must have it in their append-only files too (WAITAOF)",
    )
    retry_timeout: float = _parameter(
        30.0,
        _Kind("a number of seconds, 0 or more", _seconds, float),
        "seconds for which a broken connection or a loading server is retried",
    )
    tls_ca_file: str | None = _parameter(
        None, _STRING, "TLS: a file with the CA that signed the server's certificate"
    )
    tls_cert_file: str | None = _parameter(
        None, _STRING, "TLS: a file with the client's certificate"
    )
    tls_key_file: str | None = _parameter(
        None, _STRING, "TLS: a file with the key of the client's certificate"
    )
    username: str | None = _parameter(None, _STRING, "ACL user")
    password_file: str | None = _parameter(None, _STRING, "a file with the ACL user's password")
    encryption_key_file: str | None = _parameter(
        None, _STRING, "a file with keys that seal all that is spilled (AES-256-GCM)"
    )
    address: Address = field(default_factory=Address)

    @classmethod
    def load(
        cls, params: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
    ) -> Config:
        """Check `params` and the environment.

        Args:
            params: the spilling config's parameters, as JSON gives them. `None` values count as
                not given.
            environ: the environment; `os.environ` unless a test passes its own.

        Raises:
            ConfigError: naming the parameter, the nearest valid name, or what was expected.
        """
        environ = os.environ if environ is None else environ
        address, checked = _check_each(params or {}, environ)
        _refuse_contradictions(address, checked)
        _require_partners(checked)
        username = checked.get("username")
        password = environ.get(f"{ENV_PREFIX}PASSWORD") or address.password
        address = replace(address, username=username or address.username, password=password)
        return cls(**{**checked, "url": str(address), "address": address})


_PARAMETERS = {
    f.name: Parameter(f.name, f.default, **f.metadata) for f in fields(Config) if f.metadata
}


def parameters() -> list[Parameter]:
    """All parameters, in the order of the documentation."""
    return list(_PARAMETERS.values())


def check_params(params: Mapping[str, Any]) -> Address:
    """Check a spilling config's parameters without the environment of the process that uses them.

    Each value is checked, and so are contradictions between given parameters. The environment can
    still supply what is missing, such as a `valkeys://` url for `tls_ca_file`: `Config.load` checks
    that where the environment is known.

    Returns:
        The address, as far as `params` give it.

    Raises:
        ConfigError: no environment can make these parameters valid.
    """
    address, checked = _check_each(params, {})
    if "url" in checked:
        _refuse_contradictions(address, checked)
    return replace(address, username=checked.get("username") or address.username)


def _check_each(
    params: Mapping[str, Any], environ: Mapping[str, str]
) -> tuple[Address, dict[str, Any]]:
    """Check each parameter by itself; returns the parsed url and the values given."""
    values, sources = _collect(params, environ)
    # The url is parsed before anything else is checked, so that no later message can be the
    # first to meet, and repeat, a url with a password in it.
    address = _parse_url(
        values.get("url", _PARAMETERS["url"].default),
        from_config=params.get("url") is not None,
        port=_SENTINEL_PORT if values.get("sentinel_service") else _PORT,
    )
    _refuse_credentials(values.get("overflow_uri"))
    return address, {
        name: _PARAMETERS[name].check(value, sources[name]) for name, value in values.items()
    }


def _collect(
    params: Mapping[str, Any], environ: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values given, and what the user knows each as: its name, or a variable's."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for variable, text in environ.items():
        rest = variable.removeprefix(ENV_PREFIX)
        if rest == variable or rest in _NOT_PARAMETERS or _SERVICE_LINK.fullmatch(rest):
            continue
        name = variable[len(ENV_PREFIX) :].lower()
        if name not in _PARAMETERS or variable != variable.upper():
            raise ConfigError(_unknown(variable, [ENV_PREFIX + n.upper() for n in _PARAMETERS]))
        if text == "":
            continue
        values[name] = _PARAMETERS[name].from_text(text, variable)
        sources[name] = variable
    for name, value in params.items():
        if name not in _PARAMETERS:
            if name in ("password", "passwd"):
                raise _password_refused("a password as a parameter")
            raise ConfigError(_unknown(name, list(_PARAMETERS)))
        if value is not None:
            values[name] = value
            sources[name] = name
    return values, sources


def _password_refused(what: str) -> ConfigError:
    return ConfigError(
        f"{what} is refused, because Ray puts the spilling config on the command lines of its "
        "workers, where every user of the machine can read it",
        "Set RAY_VALKEY_SPILL_PASSWORD in the environment of every node, or give password_file, "
        "the path of a file with the password",
    )


def _refuse_credentials(overflow_uri: Any) -> None:
    """The URI's text never appears in an error, since it may hold a secret."""
    parts = str(overflow_uri or "").partition("://")[2]
    authority, _, rest = parts.partition("/")
    if ":" in authority.rpartition("@")[0] or re.search(
        "[?&]([^=&]*(key|secret|token)[^=&]*|sig)=", rest, re.IGNORECASE
    ):
        raise ConfigError(
            "credentials in overflow_uri are refused, because the spilling config is on the "
            "command lines of Ray's workers, and this URI in their messages",
            "Give them as the object store's own tools take them: by environment variables such "
            "as AWS_ACCESS_KEY_ID, by a file, or by the machine's role",
        )


def _unknown(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.5)
    if nearest:
        match = next(k for k in known if k.lower() == nearest[0])
        return f"unknown parameter {name!r}: did you mean {match!r}?"
    return f"unknown parameter {name!r}: expected one of {', '.join(known)}"


def _ill_typed(name: str, kind: _Kind, value: Any) -> str:
    shown = repr(value)
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return f"{name} must be {kind.expected}, not {type(value).__name__} {shown}"


def _parse_url(url: Any, *, from_config: bool, port: int) -> Address:
    """Parse `url`; its text never appears in an error, since it may hold a password."""
    if not isinstance(url, str) or not url:
        raise ConfigError(_ill_typed("url", _STRING, type(url)))
    try:
        parts = urlsplit(url)
        has_password = parts.password is not None
    except ValueError:
        # The error quotes the url, and that may hold a password.
        raise ConfigError(
            "url cannot be parsed", "Percent-encode what is not a letter or a digit in it"
        ) from None
    if has_password and from_config:
        raise _password_refused("a password in url")
    if "@" in f"{parts.path}{parts.query}{parts.fragment}":
        # A "/", "?" or "#" in a password ends the host part early, and the rest lands there.
        raise ConfigError(
            "url has an '@' behind its host", "Percent-encode what user name and password hold"
        )
    scheme = parts.scheme
    if scheme not in _SCHEMES:
        allowed = "url must begin with valkey://, valkeys://, redis://, rediss:// or unix://"
        raise ConfigError(
            f"{allowed}, not with {scheme + '://'!r}"
            if "://" in url
            else f"{allowed}, as in valkey://host:6379/0"
        )
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = set(query) - ({"db"} if scheme == "unix" else set())
    if unknown or parts.fragment:
        raise ConfigError(
            f"url has options behind {'?' if unknown else '#'}, which mean nothing here: they are "
            f"parameters of their own ({', '.join(_PARAMETERS)})"
        )
    return Address(
        endpoints=(_socket(parts),) if scheme == "unix" else _endpoints(parts, port),
        tls=scheme in _TLS_SCHEMES,
        db=_database(query.get("db", "0") if scheme == "unix" else parts.path.strip("/") or "0"),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
    )


def _socket(parts: SplitResult) -> Endpoint:
    # unix://name/... would silently lose its first component to the host part.
    if parts.netloc.rpartition("@")[2] or not parts.path:
        raise ConfigError("url of a unix socket needs an absolute path: unix:///run/valkey.sock")
    return Endpoint(path=unquote(parts.path))


def _endpoints(parts: SplitResult, default_port: int) -> tuple[Endpoint, ...]:
    endpoints = []
    for text in parts.netloc.rpartition("@")[2].split(","):
        try:
            one = urlsplit(f"//{text}")
            host, port = one.hostname, one.port
        except ValueError:
            raise ConfigError("url: a port must be a number from 1 to 65535") from None
        if not host or port == 0:
            raise ConfigError(
                "url must name a host and a port, as in valkey://host:6379/0, or several, with "
                "commas between them, of a cluster or of Sentinels"
            )
        endpoints.append(Endpoint(host, port or default_port))
    return tuple(endpoints)


def _refuse_contradictions(address: Address, values: Mapping[str, Any]) -> None:
    """Refuse parameters that cannot be used with the url that `address` was parsed from."""
    given = [name for name in values if name.startswith("tls_")]
    if given and not address.tls:
        raise ConfigError(f"{given[0]} is given, but url is not for TLS", "Use valkeys:// in url")
    if values.get("sentinel_service") and address.endpoints[0].path:
        raise ConfigError(
            "sentinel_service is given, but url names a unix socket",
            "Give the Sentinels' hosts, as in valkey://host1:26379,host2:26379/0",
        )
    username = values.get("username")
    if username and address.username and username != address.username:
        raise ConfigError(
            f"username is {username!r}, but url names the user {address.username!r}: "
            "give one of them"
        )


def _require_partners(values: Mapping[str, Any]) -> None:
    """Refuse a parameter that is of no use without another that is missing."""
    for name, other in (("tls_cert_file", "tls_key_file"), ("tls_key_file", "tls_cert_file")):
        if name in values and other not in values:
            raise ConfigError(f"{name} is given without {other}", "Give both or none")


def _database(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ConfigError("url: the database must be a number, as in valkey://host:6379/0")
    return int(text)
