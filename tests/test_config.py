from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ray_valkey_spill
from ray_valkey_spill import spilling_config, system_config
from ray_valkey_spill.config import Config, Endpoint, parameters
from ray_valkey_spill.errors import ConfigError
from ray_valkey_spill.units import parse_duration, parse_size

SECRET = "hunter2-secret"


def load(environ: dict[str, str] | None = None, /, **params: Any) -> Config:
    return Config.load(params, environ or {})


def test_defaults_are_those_of_the_documentation() -> None:
    config = load()
    assert str(config.address) == "valkey://127.0.0.1:6379/0"
    assert config.namespace == "default"
    assert config.key_prefix == "ray:spill:"
    assert config.compression == "auto"
    assert config.allow_eviction is False
    assert config.retry_timeout == 30
    # Below the allocator's size class of half a megabyte, with its header.
    assert (512 << 10) - 1024 <= config.chunk_size < 512 << 10


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("valkey://host", "valkey://host:6379/0"),
        ("redis://host:7000/3", "valkey://host:7000/3"),
        ("valkey://[::1]:7000/", "valkey://[::1]:7000/0"),
        ("unix:///run/valkey.sock", "unix:///run/valkey.sock"),
        ("unix:///run/valkey.sock?db=2", "unix:///run/valkey.sock?db=2"),
        ("valkey://user@host:1", "valkey://host:1/0"),
        ("valkeys://host", "valkeys://host:6379/0"),
        ("rediss://user@[::1]:1/2", "valkeys://[::1]:1/2"),
        ("valkey://a:1,b,[::1]:3/0", "valkey://a:1,b:6379,[::1]:3/0"),
    ],
)
def test_url_names_the_server(url: str, address: str) -> None:
    assert str(load(url=url).address) == address


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("host:6379", "valkey://"),
        ("http://host:6379", "http://"),
        ("valkey://host:99999", "port"),
        ("valkey://host:0", "port"),
        ("valkey://:6379", "host"),
        ("valkey://host:6379/zero", "number"),
        ("valkey://host:6379?timeout=3", "?"),
        ("valkey://host#x", "#"),
        ("valkey://a:1,b:x", "port"),
        ("valkey://a:1,,b:2", "host"),
        ("unix://relative/path", "absolute"),
        ("unix://", "absolute"),
        ("", "url"),
        (6379, "url"),
        ("valkey://[::1", "url"),
    ],
)
def test_url_that_cannot_be_used_is_refused(url: Any, says: str) -> None:
    with pytest.raises(ConfigError, match="url") as caught:
        load(url=url)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("419430400", 400 << 20),
        ("400Mi", 400 << 20),
        ("400MiB", 400 << 20),
        (" 400 MiB ", 400 << 20),
        ("1.5GiB", 3 << 29),
        ("2GB", 2 * 10**9),
        ("2G", 2 * 10**9),
        ("512KiB", 512 << 10),
        ("512kB", 512_000),
        ("1Ti", 1 << 40),
        ("7B", 7),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_a_size_may_have_a_unit_wherever_it_is_given(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert load(max_bytes=text).max_bytes == size
    assert load({"RAY_VALKEY_SPILL_MAX_BYTES": text}).max_bytes == size
    assert json.loads(spilling_config(max_bytes=text))["params"] == {"max_bytes": text}


@pytest.mark.parametrize(
    # To Kubernetes, `400m` is less than a byte; in valkey.conf, `2gb` is not 2GB.
    "text",
    ["400m", "2gb", "1.5", "0.3KiB", "-1", "1e9", "1_000", "0x10", "400 Mi B", "MiB", "\u0661"],
)
def test_a_size_that_could_be_misread_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"RAY_VALKEY_SPILL_MAX_BYTES": text})
    assert str(caught.value) == (
        "RAY_VALKEY_SPILL_MAX_BYTES must be a size in bytes, 0 or more, such as 536870912, 400MiB "
        f'or 2GB, not "{text}"'
    )


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("max_bytes", True, "true"),
        ("chunk_size", [1, "x"], '[1, "x"]'),
        ("allow_eviction", "true", '"true"'),
        ("username", {"a": 1.5}, '{"a": 1.5}'),
        ("password_file", Path("x"), '"x"'),
        ("namespace", "x" * 200, '"' + "x" * 56 + "..."),
    ],
)
def test_an_error_shows_a_value_as_json_has_it(name: str, value: Any, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**{name: value})
    if name != "password_file":
        assert str(caught.value).endswith(f", not {shown}")
    for kind in ("str", "int", "bool", "list", "dict", "NoneType", "PosixPath"):
        assert kind not in str(caught.value).replace("string", "").split()


def test_an_error_needs_no_json_of_its_value() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    for value, shown in ((10**5000, "a number"), (nested, "an array")):
        with pytest.raises(ConfigError, match=f"^max_bytes must be .*, not {shown}$"):
            load(max_bytes=value)


def test_an_error_names_the_variable_or_the_option_that_gave_the_value() -> None:
    for environ, says in (
        ({"URL": "host"}, "RAY_VALKEY_SPILL_URL must begin with"),
        ({"URL": "valkey://h:x"}, "a port in RAY_VALKEY_SPILL_URL must be"),
        ({"TLS_CA_FILE": "/ca"}, "RAY_VALKEY_SPILL_TLS_CA_FILE is given, but url does not use TLS"),
        ({"OVERFLOW_URI": "s3://k:x@b"}, "credentials in RAY_VALKEY_SPILL_OVERFLOW_URI are"),
    ):
        with pytest.raises(ConfigError) as caught:
            load({f"RAY_VALKEY_SPILL_{name}": text for name, text in environ.items()})
        assert str(caught.value).startswith(says)
    with pytest.raises(ConfigError, match=r"^--namespace must be "):
        Config.load({"namespace": "a:b"}, {}, called={"namespace": "--namespace"})


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("3d", 259200)]
)
def test_a_duration_may_have_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1", "2w", "1h30m", "inf"])
def test_a_duration_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        parse_duration(text)


def test_every_parameter_can_come_from_the_environment() -> None:
    environ = {
        "RAY_VALKEY_SPILL_URL": "valkey://elsewhere:7777/1",
        "RAY_VALKEY_SPILL_NAMESPACE": "team-a",
        "RAY_VALKEY_SPILL_KEY_PREFIX": "ray:x:",
        "RAY_VALKEY_SPILL_CHUNK_SIZE": "65536",
        "RAY_VALKEY_SPILL_COMPRESSION": "none",
        "RAY_VALKEY_SPILL_ALLOW_EVICTION": "true",
        "RAY_VALKEY_SPILL_RETRY_TIMEOUT": "2.5",
        "RAY_VALKEY_SPILL_USERNAME": "ray",
        "RAY_VALKEY_SPILL_PASSWORD_FILE": "/run/secret",
    }
    config = load(environ)
    assert (config.address.endpoints, config.address.db) == ((Endpoint("elsewhere", 7777),), 1)
    assert (config.namespace, config.key_prefix) == ("team-a", "ray:x:")
    assert (config.chunk_size, config.compression) == (65536, "none")
    assert (config.allow_eviction, config.retry_timeout) == (True, 2.5)
    assert (config.address.username, config.password_file) == ("ray", "/run/secret")


def test_the_spilling_config_wins_over_the_environment() -> None:
    assert load({"RAY_VALKEY_SPILL_NAMESPACE": "env"}, namespace="given").namespace == "given"
    assert load({"RAY_VALKEY_SPILL_NAMESPACE": "env"}, namespace=None).namespace == "env"
    assert load({"RAY_VALKEY_SPILL_NAMESPACE": ""}).namespace == "default"


@pytest.mark.parametrize("name", ["url", "encryption_key_file"])
def test_an_empty_variable_neither_means_localhost_nor_unsealed(name: str) -> None:
    variable = f"RAY_VALKEY_SPILL_{name.upper()}"
    with pytest.raises(ConfigError, match=f"^{variable} must be a non-empty string, not "):
        load({variable: ""})
    given = {"url": "valkey://elsewhere:7777", "encryption_key_file": "/run/key"}
    assert load({variable: ""}, **{name: given[name]}) == load({}, **{name: given[name]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chunk_size", "64 kilobytes"),
        ("chunk_size", ""),
        ("chunk_size", 65536.0),
        ("chunk_size", True),
        ("chunk_size", 1),
        ("chunk_size", 1 << 40),
        ("compression", "zstd"),
        ("compression", 1),
        ("allow_eviction", "true"),
        ("allow_eviction", 1),
        ("retry_timeout", "30"),
        ("retry_timeout", -1),
        ("retry_timeout", float("nan")),
        ("retry_timeout", float("inf")),
        ("retry_timeout", 10**400),
        ("namespace", "a:b"),
        ("namespace", ""),
        ("namespace", "a*"),
        ("key_prefix", "spill:"),
        ("key_prefix", "ray:sp?ll:"),
        ("key_prefix", "ray:spill\n"),
        ("username", ""),
        ("username", 7),
        ("max_bytes", "lots"),
        ("max_bytes", 2**63),
        ("max_bytes", "8EiB"),
        ("min_replicas", -1),
        ("overflow_uri", 3),
        ("tls_ca_file", []),
    ],
)
def test_an_ill_typed_value_is_an_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**{name: value})
    assert str(caught.value).startswith(f"{name} must be ")


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("RAY_VALKEY_SPILL_CHUNK_SIZE", "1 mib"),
        ("RAY_VALKEY_SPILL_CHUNK_SIZE", "1 GiB"),
        ("RAY_VALKEY_SPILL_ALLOW_EVICTION", "perhaps"),
        ("RAY_VALKEY_SPILL_RETRY_TIMEOUT", "soon"),
        ("RAY_VALKEY_SPILL_NAMESPACE", "a:b"),
    ],
)
def test_an_ill_typed_variable_is_an_error_that_names_it(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{variable} must be "):
        load({variable: text})


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("chunksize", "chunk_size"),
        ("Namespace", "namespace"),
        ("uri", "url"),
        ("compress", "compression"),
        ("retry_timeouts", "retry_timeout"),
    ],
)
def test_an_unknown_parameter_is_an_error_with_the_nearest_name(given: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"{given}.*did you mean '{nearest}'"):
        load(**{given: 1})


def test_an_unknown_parameter_like_none_lists_all() -> None:
    with pytest.raises(ConfigError) as caught:
        load(zzzzzz=1)
    assert all(parameter.name in str(caught.value) for parameter in parameters())


def test_an_unknown_variable_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'RAY_VALKEY_SPILL_CHUNK_SIZE'"):
        load({"RAY_VALKEY_SPILL_CHUNKSIZE": "65536"})


def test_variables_that_are_no_parameters_are_known() -> None:
    load({"RAY_VALKEY_SPILL_DISABLE": "0", "RAY_VALKEY_SPILL_PASSWORD": SECRET, "OTHER": "x"})


@pytest.mark.parametrize(
    "name",
    [
        *("HEAD_SVC_SERVICE_HOST", "HEAD_SVC_SERVICE_PORT", "HEAD_SVC_SERVICE_PORT_CLIENT"),
        *("HEAD_SVC_PORT", "HEAD_SVC_PORT_6379_TCP", "HEAD_SVC_PORT_6379_TCP_ADDR", "PORT"),
    ],
)
def test_variables_that_kubernetes_sets_for_a_service_are_passed_over(name: str) -> None:
    load({f"RAY_VALKEY_SPILL_{name}": "tcp://10.0.0.1:6379"})


CONTRADICTIONS = {
    "a CA without TLS": ({"tls_ca_file": "/ca.pem"}, "tls_ca_file.*valkeys://"),
    "half a certificate": (
        {"url": "valkeys://h", "tls_cert_file": "/cert.pem"},
        "tls_cert_file is given without tls_key_file",
    ),
    "only a key": (
        {"url": "valkeys://h", "tls_key_file": "/key.pem"},
        "tls_key_file is given without tls_cert_file",
    ),
    "Sentinels at a socket": (
        {"url": "unix:///s", "sentinel_service": "primary"},
        "sentinel_service.*unix socket",
    ),
}


@pytest.mark.parametrize(("params", "says"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_parameters_that_contradict_one_another_are_refused(
    params: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        load(**params)


PARTLY_IN_THE_ENVIRONMENT: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "the url": ({"tls_ca_file": "/ca.pem"}, {"URL": "valkeys://h"}),
    "the key": (
        {"url": "valkeys://h", "tls_cert_file": "/cert.pem"},
        {"TLS_KEY_FILE": "/key.pem"},
    ),
    "the certificate and the url": (
        {"tls_key_file": "/key.pem"},
        {"TLS_CERT_FILE": "/cert.pem", "URL": "valkeys://h"},
    ),
    "the url of several Sentinels": ({"sentinel_service": "primary"}, {"URL": "valkey://a,b"}),
    "the user": ({"username": "a"}, {"URL": f"valkey://a:{SECRET}@h"}),
}


@pytest.mark.parametrize(
    ("params", "environ"), PARTLY_IN_THE_ENVIRONMENT.values(), ids=PARTLY_IN_THE_ENVIRONMENT
)
def test_the_environment_may_supply_what_a_spilling_config_lacks(
    params: dict[str, Any], environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {f"RAY_VALKEY_SPILL_{name}": value for name, value in environ.items()}
    load(variables, **params)
    alone = spilling_config(**params)
    assert json.loads(alone)["params"] == params
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert spilling_config(**params) == alone


NEVER_RIGHT = {
    "a CA for a url without TLS": (
        {"url": "valkey://h", "tls_ca_file": "/ca.pem"},
        "tls_ca_file.*valkeys://",
    ),
    "Sentinels at a socket": CONTRADICTIONS["Sentinels at a socket"],
    "two users": ({"url": "valkey://b@h", "username": "a"}, r"username is 'a'.*'b'"),
}


@pytest.mark.parametrize(("params", "says"), NEVER_RIGHT.values(), ids=NEVER_RIGHT)
def test_a_spilling_config_that_no_environment_can_make_right_is_refused(
    params: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_VALKEY_SPILL_URL", "valkeys://a@h")
    with pytest.raises(ConfigError, match=says):
        spilling_config(**params)


def test_sentinels_have_a_port_of_their_own() -> None:
    config = load(url="valkey://a,b:7000", sentinel_service="primary")
    assert str(config.address) == "valkey://a:26379,b:7000/0"


def test_their_defaults_are_accepted() -> None:
    load(max_bytes=None, min_replicas=0, overflow_uri=None)


@pytest.mark.parametrize(
    "uri", ["/mnt/spill", "/mnt/with space", "file:///mnt/spill", "s3://bucket/path?region=eu"]
)
def test_an_overflow_is_a_directory_or_a_uri(uri: str) -> None:
    assert load(overflow_uri=uri).overflow_uri == uri


@pytest.mark.parametrize("uri", ["mnt/spill", "file://mnt", "http://host/x", "s3://", "", "/a\nb"])
def test_an_overflow_that_means_nothing_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="overflow_uri must be an absolute path, or a URI"):
        load(overflow_uri=uri)


# --- secrets ---


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://key:{SECRET}@bucket/path",
        f"s3://bucket/path?access_key=x&secret_key={SECRET}",
        f"s3://bucket/path?region=eu&session_token={SECRET}",
        f"abfs://container/path?sig={SECRET}",
        f"nonsense://key:{SECRET}@bucket",
    ],
)
def test_credentials_of_the_overflow_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError, match="credentials in overflow_uri are refused") as caught:
        load(overflow_uri=uri)
    assert SECRET not in str(caught.value)
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint


@pytest.mark.parametrize(
    "url",
    [
        f"valkey://:{SECRET}@host",
        f"valkey://user:{SECRET}@host:6379/0",
        f"redis://:{SECRET}@host:bad",
        f"http://:{SECRET}@host",
        f"unix://:{SECRET}@/run/s",
        f"valkeys://:{SECRET}@host",
        f"valkey://u:{SECRET}@a:1,b:2",
    ],
)
def test_a_password_in_url_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="RAY_VALKEY_SPILL_PASSWORD") as caught:
        load(url=url)
    assert SECRET not in str(caught.value)
    with pytest.raises(ConfigError, match="password_file"):
        spilling_config(url=url)


@pytest.mark.parametrize("odd", ["/", "?", "#", "/?", "\u2100", "["])
def test_a_password_that_breaks_the_url_is_not_repeated_either(odd: str) -> None:
    url = f"valkey://user:12{odd}{SECRET}@host:6379/0"
    for params, environ in (({"url": url}, {}), ({}, {"RAY_VALKEY_SPILL_URL": url})):
        with pytest.raises(ConfigError) as caught:
            Config.load(params, environ)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_text_that_no_server_or_file_system_takes_is_refused(text: str) -> None:
    for name in ("url", "username", "sentinel_service", "overflow_uri"):
        with pytest.raises(ConfigError, match=name) as caught:
            load(**{name: f"{'file:///' if name == 'overflow_uri' else 'valkey://'}{text}"})
        str(caught.value).encode()
    if "\0" in text:
        with pytest.raises(ConfigError, match="password_file"):
            load(password_file=text)
    with pytest.raises(ConfigError, match=r"RAY_VALKEY_SPILL_PASSWORD is not") as caught:
        load({"RAY_VALKEY_SPILL_PASSWORD": f"{SECRET}{text}"})
    assert SECRET not in repr(caught.value)
    with pytest.raises(ConfigError) as caught:
        load({"RAY_VALKEY_SPILL_URL": f"valkey://u:{SECRET}{text}@host"})
    assert SECRET not in repr(caught.value)


def test_a_password_as_a_parameter_is_refused() -> None:
    with pytest.raises(ConfigError, match="RAY_VALKEY_SPILL_PASSWORD") as caught:
        load(password=SECRET)
    assert SECRET not in str(caught.value)


def test_a_password_may_come_from_the_environment_alone() -> None:
    assert load({"RAY_VALKEY_SPILL_PASSWORD": SECRET}).address.password == SECRET
    in_url = load({"RAY_VALKEY_SPILL_URL": f"valkey://me:{SECRET}@host:1"})
    assert (in_url.address.username, in_url.address.password) == ("me", SECRET)
    escaped = load({"RAY_VALKEY_SPILL_URL": "valkey://me:p%40ss%2F@host:1"})
    assert escaped.address.password == "p@ss/"


def test_no_text_of_a_config_holds_the_password() -> None:
    config = load({"RAY_VALKEY_SPILL_URL": f"valkey://me:{SECRET}@host:1"})
    shown = f"{config!r} {config.address!r} {config.address} {config.url}"
    assert SECRET not in shown


def test_two_different_users_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"username is 'a'.*'b'"):
        load(url="valkey://b@host", username="a")
    assert load(url="valkey://a@host", username="a").address.username == "a"


# --- what goes into Ray's configuration ---


def test_spilling_config_holds_what_was_given_and_nothing_else() -> None:
    text = spilling_config(url="valkey://host:1", chunk_size=4096)
    assert json.loads(text) == {
        "type": "valkey",
        "params": {"url": "valkey://host:1", "chunk_size": 4096},
    }
    assert json.loads(spilling_config()) == {"type": "valkey", "params": {}}


def test_spilling_config_takes_nothing_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_VALKEY_SPILL_URL", f"valkey://:{SECRET}@host")
    assert json.loads(spilling_config(namespace="a"))["params"] == {"namespace": "a"}


def test_system_config_is_what_ray_init_takes() -> None:
    assert system_config(url="valkey://h:1") == {
        "object_spilling_config": spilling_config(url="valkey://h:1"),
        "local_fs_capacity_threshold": 1,
    }


def test_a_wrong_parameter_is_found_when_the_config_is_made() -> None:
    with pytest.raises(ConfigError, match="chunk_size"):
        spilling_config(chunk_size="1")
    with pytest.raises(ConfigError, match="did you mean 'namespace'"):
        system_config(namespaces="a")


@pytest.mark.parametrize("url", ["valkey://::1:6379/0", "valkey://[::1/0", "valkey://a,::1:2"])
def test_an_ipv6_address_without_brackets_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match=r"brackets, as in valkey://\[::1\]:6379/0"):
        load(url=url)


@pytest.mark.parametrize("name", ["password_file", "tls_ca_file", "encryption_key_file"])
def test_what_can_be_no_path_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load(url="valkeys://host", **{name: "\ud800"})


@pytest.mark.parametrize("make", [spilling_config, system_config])
def test_a_wrong_url_is_reported_without_frames_of_this_package(
    make: Callable[..., object],
) -> None:
    """But that of the function that was called, which no exception can be without."""
    with pytest.raises(ConfigError) as caught:
        make(url="host:6379")
    package = Path(ray_valkey_spill.__file__).parent
    ours = [entry for entry in caught.traceback if package in Path(entry.path).parents]
    assert [entry.name for entry in ours] == [make.__name__]
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
