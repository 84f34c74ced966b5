from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from click.testing import CliRunner
from support.servers import Server, acl_user, valkey_server, wait_until

from ray_valkey_spill import __version__
from ray_valkey_spill.cli.commands import cli as in_process
from ray_valkey_spill.cli.demo import Report
from ray_valkey_spill.config import parameters
from ray_valkey_spill.format.names import Owner
from ray_valkey_spill.units import MIB


def cli(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ray_valkey_spill", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
        check=False,
    )


def findings(*args: str, **env: str) -> tuple[int, dict[str, dict[str, str]]]:
    result = cli("check", "--json", *args, **env)
    report = json.loads(result.stdout)
    assert report["ok"] == (result.returncode == 0)
    return result.returncode, {finding["subject"]: finding for finding in report["findings"]}


def test_help_and_version() -> None:
    assert __version__ in cli("--version").stdout
    printed = cli("--help").stdout
    listed = {line.split()[0] for line in printed.partition("Commands:")[2].splitlines()[1:]}
    assert listed == {"check", "config", "demo", "gc", "inspect", "ls", "stats"}
    for command in listed - {"demo"}:
        printed = CliRunner().invoke(in_process, [command, "--help"]).stdout
        for parameter in parameters():
            assert f"--{parameter.name.replace('_', '-')}" in printed


# --- config ---


def test_config_prints_forms_that_work_when_pasted() -> None:
    result = cli("config", "--url", "valkey://host:7000", "--chunk-size", "65536", "--json")
    printed = json.loads(result.stdout)
    spilling = {"type": "valkey", "params": {"url": "valkey://host:7000", "chunk_size": 65536}}
    assert printed["object_spilling_config"] == spilling
    assert json.loads(printed["system_config"]["object_spilling_config"]) == spilling
    forms = printed["forms"]

    ray, start, head, option = shlex.split(forms["ray start"])
    assert (ray, start, head) == ("ray", "start", "--head")
    given = json.loads(option.removeprefix("--system-config="))
    assert json.loads(given["object_spilling_config"]) == spilling
    assert given == printed["system_config"]

    shell = (
        f"{forms['environment']}\n"
        'printf "%s\\n" "$RAY_object_spilling_config" "$RAY_local_fs_capacity_threshold"'
    )
    config, threshold = subprocess.check_output(["sh", "-c", shell], text=True).splitlines()
    assert json.loads(config) == spilling
    assert threshold == "1"

    cluster = yaml.safe_load(forms["KubeRay"])
    env = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    assert json.loads(env[0]["value"]) == spilling
    assert env[1] == {"name": "RAY_local_fs_capacity_threshold", "value": "1"}
    assert env[2]["name"] == "RAY_VALKEY_SPILL_PASSWORD"
    workers = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["env"]
    assert workers == env[1:]

    script = forms["Python"].replace("ray.init(_system_config=", "print(repr(")
    script = script.replace("import ray,", "import") + ")"
    assert "65536" in subprocess.check_output([sys.executable, "-c", script], text=True)


def test_config_names_the_file_that_has_the_password() -> None:
    options = ("--username", "ray", "--password-file", "/etc/valkey/password")
    printed = cli("config", *options).stdout
    assert printed.endswith("# The password: /etc/valkey/password, on every node.\n")
    assert "RAY_VALKEY_SPILL_PASSWORD" not in printed
    form = json.loads(cli("config", *options, "--json").stdout)["forms"]["KubeRay"]
    (container,) = yaml.safe_load(form)["headGroupSpec"]["template"]["spec"]["containers"]
    names = [each["name"] for each in container["env"]]
    assert names == ["RAY_object_spilling_config", "RAY_local_fs_capacity_threshold"]
    assert "need /etc/valkey/password" in form
    in_environment = cli("config", "--username", "ray").stdout
    assert in_environment.endswith("RAY_VALKEY_SPILL_PASSWORD in the environment, on every node.\n")


def test_config_takes_parameters_whose_url_is_in_the_environment() -> None:
    result = cli("config", "--username", "ray", "--tls-ca-file", "/ca.pem")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("in the environment, on every node.\n")


def test_config_without_options_is_complete_too() -> None:
    printed = cli("config").stdout
    assert 'export RAY_object_spilling_config=\'{"type": "valkey", "params": {}}\'' in printed


def test_config_refuses_what_ray_would() -> None:
    for args, says in (
        (("--chunk-size", "many"), "chunk_size must be"),
        (("--url", "valkey://:hunter2@h"), "RAY_VALKEY_SPILL_PASSWORD"),
        (("--namespace", "a:b"), "namespace must be"),
    ):
        result = cli("config", *args)
        assert result.returncode == 2
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("Error: ")
        assert says in line
        assert "hunter2" not in line


# --- check ---


def test_check_of_a_good_server(server: Server) -> None:
    server.client.config_set("maxmemory", "1gb")
    code, found = findings("--url", server.url)
    assert code == 0
    assert {finding["status"] for finding in found.values()} == {"ok"}
    assert "Valkey 9" in found["server"]["detail"]
    assert "1,024 MiB" in found["memory"]["detail"]
    assert "MB/s" in found["throughput"]["detail"]
    assert "median" in found["latency"]["detail"]


def test_check_takes_the_server_from_the_environment(server: Server) -> None:
    code, found = findings(RAY_VALKEY_SPILL_URL=server.url)
    assert code == 0
    assert str(server.port) in found["server"]["detail"]


def test_check_says_what_is_wrong_and_how_to_mend_it(server: Server) -> None:
    server.client.config_set("maxmemory-policy", "allkeys-lru")
    code, found = findings("--url", server.url)
    assert code == 1
    assert found["policy"]["status"] == "failed"
    assert "volatile-lru" in found["policy"]["hint"]
    assert findings("--url", server.url, "--allow-eviction", "true")[0] == 0

    code, found = findings("--url", "valkey://127.0.0.1:1")
    assert code == 1
    assert found["server"]["status"] == "failed"
    assert "Start it" in found["server"]["hint"]

    code, found = findings(RAY_VALKEY_SPILL_NAMESPCE="x")
    assert code == 1
    assert "RAY_VALKEY_SPILL_NAMESPACE" in found["parameters"]["detail"]


def test_check_knows_a_hook_that_is_switched_off_and_a_setting_that_wins(server: Server) -> None:
    code, found = findings("--url", server.url, RAY_VALKEY_SPILL_DISABLE="1")
    assert code == 1
    assert "RAY_VALKEY_SPILL_DISABLE" in found["start-up hook"]["detail"]
    code, found = findings("--url", server.url, RAY_object_spilling_directory="/tmp")
    assert code == 1
    assert found["environment"]["hint"] == "Unset it"


def test_check_warns_of_a_server_that_is_almost_full(server: Server) -> None:
    server.client.config_set("maxmemory", server.client.info("memory")["used_memory"] + 50_000)
    code, found = findings("--url", server.url)
    server.client.config_set("maxmemory", 0)
    assert found["memory"]["status"] == "warn"
    assert found["throughput"]["status"] == "warn"
    assert code == 0


def test_check_warns_where_keys_of_others_could_be_evicted_and_no_max_bytes_is_given(
    server: Server, tmp_path: Path
) -> None:
    server.client.config_set("maxmemory-policy", "volatile-lru")
    server.client.config_set("maxmemory", 256 * MIB)
    assert findings("--url", server.url)[1]["memory"]["status"] == "ok"
    server.client.set("session:1", "state", ex=3600)
    code, found = findings("--url", server.url)
    assert code == 0
    assert found["memory"]["status"] == "warn"
    assert re.search(r"2\d\d MiB free for spilling with nothing", found["memory"]["detail"])
    assert "keys with a TTL (1)" in found["memory"]["detail"]
    assert "spills wait" in found["memory"]["detail"]
    assert "Give max_bytes" in found["memory"]["hint"]
    assert "overflow_uri" in found["memory"]["hint"]
    _, found = findings("--url", server.url, "--overflow-uri", str(tmp_path))
    assert "the overflow takes the rest" in found["memory"]["detail"]
    _, found = findings("--url", server.url, "--max-bytes", str(100 * MIB))
    assert found["memory"]["status"] == "ok"
    server.client.delete("session:1")


def test_check_names_missing_permissions(server: Server) -> None:
    with acl_user([server.client], "~ray:* +get +info", name="weak"):
        code, found = findings(
            *("--url", server.url, "--username", "weak"), RAY_VALKEY_SPILL_PASSWORD="secret"
        )
    assert code == 1
    assert "UNLINK, ZREM" in found["permissions"]["detail"]
    assert "+zadd" in found["permissions"]["hint"]


def test_check_is_readable_at_eighty_columns(server: Server) -> None:
    result = cli("check", "--url", server.url, COLUMNS="80")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in result.stdout  # colour is for terminals
    assert any(line.startswith("ok     throughput") for line in lines)


# --- demo ---


@pytest.fixture
def nothing_left(short_dir: Path) -> Iterator[dict[str, str]]:
    """An environment whose home and temporary directories must be empty afterwards."""
    home, temporary = short_dir / "h", short_dir / "t"
    home.mkdir()
    temporary.mkdir()
    yield {"HOME": str(home), "TMPDIR": str(temporary)}
    wait_until(lambda: list(temporary.iterdir()) == [])
    assert list(home.iterdir()) == []
    wait_until(lambda: not started_with(home))


def started_with(home: Path) -> list[str]:
    """The names of the processes that have this home directory."""
    processes = psutil.process_iter(["name", "environ"])
    ours = [p.info for p in processes if (p.info["environ"] or {}).get("HOME") == str(home)]
    return [info["name"] for info in ours]


@pytest.mark.slow
def test_demo_shows_a_gibibyte_spilled_and_restored(nothing_left: dict[str, str]) -> None:
    # Settings of the user's that must not reach the demo's own cluster.
    other = {"RAY_VALKEY_SPILL_URL": "valkey://nowhere:1", "RAY_ADDRESS": "nowhere:2"}
    result = cli("demo", "--json", **nothing_left, **other)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["logical_bytes"] >= 1 << 30
    assert report["verified_objects"] == report["objects"]
    assert report["spilled_objects"] > 0.8 * report["objects"]
    assert report["restored_objects"] > 0.8 * report["objects"]
    assert report["spilled_bytes"] > 0.8 * report["logical_bytes"]
    assert report["restored_bytes"] > 0.8 * report["logical_bytes"]
    assert 0 < report["stored_bytes"] < report["logical_bytes"]
    assert report["compression_ratio"] > 1
    assert report["keys_left"] == 0
    assert report["failure"] == ""


@pytest.mark.slow
def test_demo_that_is_interrupted_leaves_nothing_either(nothing_left: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_valkey_spill", "demo"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **nothing_left},
        start_new_session=True,  # so that all of its group can be reached, as by Ctrl-C
    )
    spilling = Path(nothing_left["TMPDIR"])
    try:
        wait_until(lambda: list(spilling.glob("rvs-*/session_*/logs/io_worker*")))
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=60)


def test_demo_says_that_ray_did_not_spill() -> None:
    report = Report(objects=3, verified_objects=3, keys_left=0)
    report.note_stored({}, Owner("session", "node"))
    report.note_failure()
    assert report.failure == "Ray did not spill"
    assert ("stored in Valkey", "0.0 MiB") in report.rows()


def test_demo_says_when_the_hook_is_off() -> None:
    result = cli("demo", RAY_VALKEY_SPILL_DISABLE="1")
    assert result.returncode == 1
    assert result.stderr.startswith("Error: the start-up hook is not active")


def test_the_entry_point_is_installed() -> None:
    with valkey_server() as server:
        command = Path(sys.executable).with_name("ray-valkey-spill")
        printed = subprocess.check_output(
            [str(command), "check", "--json", "--url", server.url], text=True
        )
    assert json.loads(printed)["ok"]
