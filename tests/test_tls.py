"""Connections over TLS: to a server that speaks it itself, and through something that ends it."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import ssl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from support.certificates import make_certificates
from support.proxy import answering, proxy_to
from support.servers import ROOT, valkey_server
from support.tls import TLSServer, tls_binary, tls_front, tls_server

from ray_valkey_spill import spilling_config
from ray_valkey_spill._startup import RAY_MODULE
from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    ConfigError,
    NotValkeyError,
    ServerRefusedError,
    ServerUnavailableError,
)
from ray_valkey_spill.protocol.resp import command, fetch, store
from ray_valkey_spill.tiers import preflight
from ray_valkey_spill.tiers.ledger import link_to

pytestmark = pytest.mark.usefixtures("no_thread_left")

KEY = f"{ROOT}test"

Start = Callable[..., AbstractContextManager[TLSServer]]


@contextlib.contextmanager
def behind_a_front(directory: Path, **options: Any) -> Iterator[TLSServer]:
    with valkey_server() as server, tls_front(directory, server.port, **options) as front:
        yield front


STARTS = {"front": behind_a_front, **({"server": tls_server} if tls_binary() else {})}


@pytest.fixture(params=STARTS.values(), ids=STARTS)
def start(request: pytest.FixtureRequest) -> Start:
    return request.param


def config(server: TLSServer, **params: Any) -> Config:
    params = {"url": server.url, **server.certificates.params(), **params}
    return Config.load(params, {})


def info(wanted: Config) -> str:
    with contextlib.closing(link_to(wanted)) as link:
        return link.info().product


def test_values_of_any_size_go_both_ways(start: Start, tmp_path: Path) -> None:
    sizes = [0, 1, 16_383, 16_384, 16_385, 1 << 20, (8 << 20) + 7]
    values = [bytes([i]) * size for i, size in enumerate(sizes)]
    with start(tmp_path) as server, contextlib.closing(link_to(config(server))) as link:
        link.execute(*[store(f"{KEY}:{i}", [value]) for i, value in enumerate(values)])
        assert [server.client.get(f"{KEY}:{i}") for i in range(len(values))] == values
        targets = [bytearray(size) for size in sizes]
        requests = [fetch(f"{KEY}:{i}", into=memoryview(t)) for i, t in enumerate(targets)]
        assert [request.result() for request in link.run(requests)] == sizes
        assert targets == values


def test_a_value_that_is_too_long_for_the_server_is_refused_as_such(
    start: Start, tmp_path: Path
) -> None:
    with start(tmp_path) as server:
        server.client.config_set("proto-max-bulk-len", "1mb")
        link = link_to(config(server, chunk_size=3 << 20))
        with pytest.raises(ServerRefusedError, match=r"bulk length.*proto-max-bulk-len"):
            link.execute(*[store(f"{KEY}:{i}", [bytes(3 << 20)]) for i in range(6)])
        link.close()


def test_many_small_requests_keep_in_step(start: Start, tmp_path: Path) -> None:
    with start(tmp_path) as server, contextlib.closing(link_to(config(server))) as link:
        link.execute(*[store(f"{KEY}:{i}", [b"%d" % i] * 3) for i in range(2000)])
        values = link.execute(*[command("GET", f"{KEY}:{i}") for i in range(2000)])
        assert values == [b"%d" % i * 3 for i in range(2000)]


@pytest.mark.parametrize("cut_after", [0, 1, 5000, 700_000])
def test_a_connection_that_is_cut_goes_on(start: Start, tmp_path: Path, cut_after: int) -> None:
    values = [bytes([i]) * (1 << 19) for i in range(6)]
    with start(tmp_path) as server, proxy_to(server.port) as proxy:
        url = f"valkeys://127.0.0.1:{proxy.url.rpartition(':')[2]}"
        with contextlib.closing(link_to(config(server, url=url))) as link:
            link.execute(command("STRLEN", KEY))
            proxy.to_server.reset_after = cut_after
            link.execute(*[store(f"{KEY}:{i}", [value]) for i, value in enumerate(values)])
            proxy.to_client.reset_after = cut_after
            found = link.execute(*[command("GET", f"{KEY}:{i}") for i in range(6)])
            assert found == values
            assert link.breaks >= 2


def test_a_server_that_stalls_is_noticed(start: Start, tmp_path: Path) -> None:
    with start(tmp_path) as server, proxy_to(server.port) as proxy:
        url = f"valkeys://127.0.0.1:{proxy.url.rpartition(':')[2]}"
        with contextlib.closing(link_to(config(server, url=url, retry_timeout=1))) as link:
            link.execute(command("STRLEN", KEY))
            proxy.stall()
            with pytest.raises(ServerUnavailableError, match="tried for 1 s"):
                link.execute(command("STRLEN", KEY))
            proxy.flow()
            assert link.execute(command("STRLEN", KEY)) == [0]


def test_a_head_start_looks_at_a_server_with_tls(start: Start, tmp_path: Path) -> None:
    with start(tmp_path) as server:
        assert preflight.run_all(config(server)).role == "master"


# --- what is trusted ---


def test_a_certificate_of_another_ca_is_refused_at_once(start: Start, tmp_path: Path) -> None:
    others = make_certificates(tmp_path / "others")
    with start(tmp_path) as server:
        for ca in (str(others.ca), None):
            with pytest.raises(ServerRefusedError, match=r"certificate .* is refused.*tls_ca_file"):
                info(config(server, tls_ca_file=ca, retry_timeout=60))


def test_a_certificate_for_another_host_is_refused_at_once(start: Start, tmp_path: Path) -> None:
    with (
        start(tmp_path, names=("valkey.example", "10.1.2.3")) as server,
        pytest.raises(ServerRefusedError, match=r"mismatch.*Name the host in url"),
    ):
        info(config(server, retry_timeout=60))


def test_a_certificate_that_has_expired_is_refused_at_once(tmp_path: Path) -> None:
    """Through a front, for a server's own client would wait for it in vain."""
    with (
        behind_a_front(tmp_path, expired=True) as server,
        pytest.raises(ServerRefusedError, match=r"expired.*Renew it"),
    ):
        info(config(server, retry_timeout=60))


def test_a_host_may_be_named_as_in_the_certificate(start: Start, tmp_path: Path) -> None:
    with start(tmp_path, names=("localhost",)) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        assert info(config(server, url=url)) in ("Valkey", "Redis")


def test_a_server_may_want_a_certificate_of_its_clients(start: Start, tmp_path: Path) -> None:
    nothing_shown = {"tls_cert_file": None, "tls_key_file": None}
    others = make_certificates(tmp_path / "others").client
    anothers = {"tls_cert_file": str(others.certificate), "tls_key_file": str(others.key)}
    with start(tmp_path, client_certificate_required=True) as server:
        assert info(config(server)) in ("Valkey", "Redis")
        for shown in (nothing_shown, anothers):
            with pytest.raises(ServerRefusedError, match=r"refuses the TLS conn.*tls_cert_file"):
                info(config(server, **shown, retry_timeout=60))


def test_ray_takes_certificates_for_a_url_that_is_in_the_environment(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(RAY_MODULE)
    with (
        contextlib.ExitStack() as after,
        start(tmp_path, client_certificate_required=True) as server,
    ):
        after.callback(module.reset_external_storage)
        params = server.certificates.params()
        monkeypatch.setenv("RAY_VALKEY_SPILL_URL", server.url)
        monkeypatch.setenv("RAY_VALKEY_SPILL_TLS_KEY_FILE", params.pop("tls_key_file"))
        config = json.loads(spilling_config(**params))
        module.setup_external_storage(config, "ab" * 28, "session").destroy_external_storage()


def test_old_versions_of_tls_are_not_spoken(tmp_path: Path) -> None:
    with behind_a_front(tmp_path) as server:
        from ray_valkey_spill.protocol import tls

        assert tls.context(config(server)).minimum_version == ssl.TLSVersion.TLSv1_2


# --- what cannot work ---


def test_tls_is_not_spoken_to_a_server_without(tmp_path: Path) -> None:
    params = make_certificates(tmp_path).params()
    with valkey_server() as server:
        # It waits for more.
        silent = Config.load({"url": f"valkeys://127.0.0.1:{server.port}", **params}, {})
        with pytest.raises(ServerUnavailableError, match=r"TLS handshake.*valkey:// if not"):
            preflight.run_all(silent)
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        talking = Config.load({"url": url.replace("valkey", "valkeys"), **params}, {})
        with pytest.raises(NotValkeyError, match=r"does not speak TLS.*valkey://"):
            info(talking)


def test_a_server_with_tls_is_said_to_want_it(start: Start, tmp_path: Path) -> None:
    with start(tmp_path) as server:
        plain = Config.load({"url": f"valkey://127.0.0.1:{server.port}", "retry_timeout": 0.3}, {})
        with pytest.raises(ServerUnavailableError, match=r"valkeys:// if it wants TLS"):
            preflight.run_all(plain)


@pytest.mark.parametrize("content", [None, "", "no PEM"])
def test_a_ca_that_cannot_be_used_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    wanted = Config.load({"url": "valkeys://127.0.0.1:1", "tls_ca_file": str(path)}, {})
    with pytest.raises(ConfigError, match=f"tls_ca_file '{path}' cannot be used"):
        info(wanted)


@pytest.mark.parametrize("broken", ["tls_cert_file", "tls_key_file"])
@pytest.mark.parametrize("content", [None, "no PEM"])
def test_a_client_certificate_that_cannot_be_used_is_named(
    tmp_path: Path, broken: str, content: str | None
) -> None:
    params = make_certificates(tmp_path).params()
    params[broken] = str(tmp_path / "other.pem")
    if content is not None:
        Path(params[broken]).write_text(content)
    wanted = Config.load({"url": "valkeys://127.0.0.1:1", **params}, {})
    with pytest.raises(ConfigError, match=r"tls_cert_file '.*' and tls_key_file '.*' cannot"):
        info(wanted)


# --- what changes ---


def test_renewed_certificates_are_found_with_the_next_connection(
    start: Start, tmp_path: Path
) -> None:
    # The same files, as a mounted secret has them.
    files = {name: str(tmp_path / f"{name}.pem") for name in make_certificates(tmp_path).params()}
    with start(tmp_path / "first") as server:
        for name, path in server.certificates.params().items():
            shutil.copy(path, files[name])
        with proxy_to(server.port) as proxy:
            url = f"valkeys://127.0.0.1:{proxy.url.rpartition(':')[2]}"
            with contextlib.closing(link_to(config(server, url=url, **files))) as link:
                link.execute(command("STRLEN", KEY))
                with start(tmp_path / "second", client_certificate_required=True) as renewed:
                    for name, path in renewed.certificates.params().items():
                        shutil.copy(path, files[name])
                    proxy.forward_to(renewed.port)
                    proxy.reset()
                    renewed.client.set(KEY, "renewed")
                    assert link.execute(command("GET", KEY)) == [b"renewed"]
