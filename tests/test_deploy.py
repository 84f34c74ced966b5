"""What deploy/ has is valid, fits together, and does on a real server what it is there for."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import kubernetes_validate
import pytest
import valkey
import yaml
from click.testing import CliRunner
from packaging.requirements import Requirement
from support import samples
from support.clock import Clock
from support.servers import Node, free_port, valkey_server, wait_until
from support.stores import Store
from support.tenants import Embeddings, KVCache, LastingSessions, Neighbour, Sessions, Spills

from ray_valkey_spill.cli.commands import cli
from ray_valkey_spill.config import Config, parameters
from ray_valkey_spill.plugin.spilling_config import RAY_SETTINGS
from ray_valkey_spill.store import cleanup
from ray_valkey_spill.tiers import preflight

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
SMALL = ("valkey-values.yaml",)
SCALED = (*SMALL, "valkey-values-scaled.yaml")
both_sizes = pytest.mark.parametrize("files", [SMALL, SCALED], ids=["2Gi", "8Gi"])

# The oldest that has not reached its end at the time of writing, or is close to it, and the newest
# that the schemas are there for.
KUBERNETES = ["1.32", kubernetes_validate.latest_version()]

GIB, MIB = 1 << 30, 1 << 20
NEIGHBOURS = {"vllm": KVCache, "embeddings": Embeddings, "sessions": Sessions}
PREFIXES = {"ray": "ray:spill:default:"} | {user: t.prefix for user, t in NEIGHBOURS.items()}


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def values_of(files: tuple[str, ...]) -> dict[str, Any]:
    """The values that Helm makes of several files."""
    merged: dict[str, Any] = {}
    for name in files:
        merged = _merged(merged, documents(name)[0])
    return merged


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        name: _merged(below[name], value) if isinstance(value, dict) else value
        for name, value in above.items()
        if name in below
    }
    return {**below, **above, **both}


def size_of(quantity: str) -> int:
    """Bytes, of what Kubernetes calls a quantity."""
    number, unit = int(quantity[:-2]), quantity[-2:]
    return number * {"Mi": MIB, "Gi": GIB}[unit]


def groups_of(spec: Mapping[str, Any]) -> list[Any]:
    """The head's group of a RayCluster's spec, then the workers'."""
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pods_of(spec: Mapping[str, Any]) -> list[Any]:
    return [group["template"]["spec"] for group in groups_of(spec)]


def templates_of(spec: Mapping[str, Any]) -> list[Any]:
    """Its pods' templates, as objects that the schemas of Kubernetes know."""
    return [
        {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
        for group in groups_of(spec)
    ]


def groups() -> list[Any]:
    (cluster,) = documents("raycluster.yaml")
    return groups_of(cluster["spec"])


def pods() -> list[Any]:
    return [group["template"]["spec"] for group in groups()]


def mounts_of(pod: Mapping[str, Any]) -> dict[str, Any]:
    """The volumes of Ray's container, by the directory in which it has them."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = pod["containers"][0]["volumeMounts"]
    return {mount["mountPath"]: volumes[mount["name"]] for mount in mounts}


def spilling_config() -> dict[str, Any]:
    """What the RayCluster's head has in its environment."""
    variable = pods()[0]["containers"][0]["env"][0]
    assert variable["name"] == "RAY_object_spilling_config"
    config: dict[str, Any] = json.loads(variable["value"])
    return config


@dataclass(frozen=True)
class Deployed:
    """A server with the options and the users of the values files, each with a password."""

    node: Node
    passwords: dict[str, str]
    directory: Path

    @property
    def params(self) -> dict[str, Any]:
        """The RayCluster's, with this server's address and files."""
        files = {
            "password_file": self._file("password", self.passwords["ray"]),
            "encryption_key_file": self._file("keys", "5e" * 32),
            "overflow_uri": str(self.directory / "overflow"),
        }
        return {**spilling_config()["params"], "url": self.node.url, **files}

    @property
    def config(self) -> Config:
        return Config.load(self.params, {})

    def url(self, user: str) -> str:
        return self.node.url.replace("://", f"://{user}:{self.passwords[user]}@")

    def connect(self, user: str) -> valkey.Valkey:
        return valkey.Valkey(port=self.node.port, username=user, password=self.passwords[user])

    def restart(self) -> None:
        """As Kubernetes does it, when it is asked to."""
        assert self.node.process is not None
        self.node.process.terminate()
        self.node.process.wait()
        self.node.start()
        wait_until(self.node.serves)

    def _file(self, name: str, text: str) -> str:
        path = self.directory / name
        path.write_text(text)
        return str(path)


@contextlib.contextmanager
def deployed(directory: Path, files: tuple[str, ...]) -> Iterator[Deployed]:
    values = values_of(files)
    users = values["auth"]["aclUsers"]
    passwords = {user: secrets.token_hex(32) for user in users}
    acl, options = directory / "users.acl", directory / "values.conf"
    # As the chart's script does it.
    for user, entry in users.items():
        password = passwords[entry.get("passwordKey", user)]
        digest = hashlib.sha256(password.encode()).hexdigest()
        with acl.open("a") as lines:
            lines.write(f"user {user} on #{digest} {entry['permissions']}\n")
    options.write_text(values["valkeyConfig"])
    node = Node(
        directory / "server",
        free_port(),
        {"aclfile": acl, "include": options},
        username="admin",
        password=passwords["admin"],
    )
    with contextlib.closing(node):
        node.start()
        wait_until(node.serves)
        (directory / "overflow").mkdir()
        yield Deployed(node, passwords, directory)


# --- the server, with what the values files give it ---


@both_sizes
def test_memory_and_volume_hold_what_the_server_may_need(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    values = values_of(files)
    with deployed(tmp_path, files) as server:
        options = server.node.client.config_get("*")
    # What is written while a snapshot is being taken exists twice.
    copies = 2 if options["save"] else 1
    maxmemory = int(options["maxmemory"])
    assert copies * maxmemory * 1.15 + 64 * MIB < size_of(values["resources"]["limits"]["memory"])
    # A snapshot is written beside the one before.
    assert 2 * maxmemory < size_of(values["dataStorage"]["requestedSize"])
    assert options["maxmemory-policy"] == "volatile-lru"
    assert options["appendonly"] == "no"


@both_sizes
def test_the_ray_cluster_can_spill_to_it(tmp_path: Path, files: tuple[str, ...]) -> None:
    with deployed(tmp_path, files) as server:
        info = preflight.run_all(server.config)
        assert info.memory.maxmemory > server.params["max_bytes"]
        with contextlib.closing(Spills(server.config, 20)) as spills:
            for _ in range(20):
                spills.step()
            spills.check_all()
            spills.delete_all()
            assert not spills.tally.misses
            assert not spills.tally.wrong
            assert not spills.tally.errors


@both_sizes
def test_a_restart_keeps_what_is_stored(tmp_path: Path, files: tuple[str, ...]) -> None:
    with deployed(tmp_path, files) as server:
        sessions = Sessions(server.url("sessions"), 50)
        spills = Spills(server.config, 10)
        with contextlib.closing(sessions), contextlib.closing(spills):
            for tenant in (sessions, spills):
                for _ in range(10):
                    tenant.step()
            server.restart()
            for tenant in (sessions, spills):
                tenant.check_all()
                assert tenant.tally.operations == 30
                assert not tenant.tally.misses
                assert not tenant.tally.wrong


def test_caches_make_room_for_spills_and_for_sessions_without_a_ttl(tmp_path: Path) -> None:
    with deployed(tmp_path, SMALL) as server:
        server.node.client.config_set("maxmemory", 64 * MIB)
        sessions = LastingSessions(server.url("sessions"), 50)
        cache = KVCache(server.url("vllm"), 500)
        spills = Spills(server.config, 16)
        with contextlib.ExitStack() as open_tenants:
            for tenant, steps in ((sessions, 50), (cache, 500), (spills, 16)):
                open_tenants.enter_context(contextlib.closing(tenant))
                for _ in range(steps):
                    tenant.step()
            for tenant in (sessions, cache, spills):
                tenant.check_all()
                assert not tenant.tally.errors
                assert not tenant.tally.wrong
        assert server.node.client.info("stats")["evicted_keys"] > 0
    assert cache.tally.misses > 0
    assert sessions.tally.misses == 0
    assert spills.tally.misses == 0


# --- its users ---


def test_each_user_works_on_keys_of_its_own_alone(tmp_path: Path) -> None:
    with deployed(tmp_path, SMALL) as server:
        for user, prefix in PREFIXES.items():
            server.node.client.set(f"{prefix}mine", user)
        for user, own in PREFIXES.items():
            with server.connect(user) as client:
                assert client.get(f"{own}mine") == user.encode()
                for prefix in set(PREFIXES.values()) - {own}:
                    for command in (
                        *(f"GET {prefix}mine", f"SET {prefix}mine theirs", f"UNLINK {prefix}mine"),
                        f"RENAME {own}mine {prefix}mine",
                    ):
                        with pytest.raises(valkey.exceptions.NoPermissionError):
                            client.execute_command(*command.split())
        kept = {user: server.node.client.get(f"{prefix}mine") for user, prefix in PREFIXES.items()}
        assert kept == {user: user.encode() for user in PREFIXES}


@pytest.mark.parametrize("user", [*PREFIXES, "metrics"])
def test_no_user_but_the_admin_sees_or_touches_everything(tmp_path: Path, user: str) -> None:
    with deployed(tmp_path, SMALL) as server, server.connect(user) as client:
        for command in (
            *("KEYS *", "SCAN 0", "RANDOMKEY", "FLUSHALL", "FLUSHDB", "SWAPDB 0 1"),
            *("CONFIG GET *", "ACL LIST", "CLIENT LIST", "CLIENT KILL ID 1", "MONITOR", "SAVE"),
            *("SHUTDOWN", "REPLICAOF NO ONE", "SLOWLOG GET", "FUNCTION LIST"),
        ):
            with pytest.raises(valkey.exceptions.NoPermissionError):
                client.execute_command(*command.split())


def test_nobody_gets_in_without_a_password_of_a_user(tmp_path: Path) -> None:
    with deployed(tmp_path, SMALL) as server:
        port = server.node.port
        with valkey.Valkey(port=port) as client, pytest.raises(valkey.AuthenticationError):
            client.ping()
        # The exporter's is what the chart gives to the user that is off.
        for password in ("", server.passwords["metrics"], server.passwords["default"]):
            with (
                valkey.Valkey(port=port, username="default", password=password) as client,
                pytest.raises(valkey.AuthenticationError),
            ):
                client.ping()


def test_the_exporter_gets_its_figures_and_no_keys(tmp_path: Path) -> None:
    environment = values_of(SMALL)["metrics"]["exporter"]["extraEnvs"]
    with deployed(tmp_path, SMALL) as server, server.connect(environment["REDIS_USER"]) as client:
        assert client.info("memory")["maxmemory"] == 800 * MIB
        for command in ("PING", "CLIENT SETNAME x", "LATENCY LATEST", "LATENCY HISTOGRAM"):
            client.execute_command(*command.split())
        for prefix in PREFIXES.values():
            with pytest.raises(valkey.exceptions.NoPermissionError):
                client.get(f"{prefix}mine")


@pytest.mark.parametrize("user", NEIGHBOURS)
def test_neighbours_can_do_their_work(tmp_path: Path, user: str) -> None:
    with deployed(tmp_path, SMALL) as server:
        tenant: Neighbour = NEIGHBOURS[user](server.url(user), 20)
        with contextlib.closing(tenant):
            for _ in range(40):
                tenant.step()
            tenant.check_all()
        assert not tenant.tally.errors
        assert not tenant.tally.misses
        assert not tenant.tally.wrong


def test_rays_permissions_are_those_that_the_tool_prints() -> None:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in ray_params().items()]
    printed = CliRunner().invoke(cli, ["config", "--acl", "--json", *given])
    acl = json.loads(printed.output)["acl"]
    permissions = values_of(SMALL)["auth"]["aclUsers"][acl["user"]]["permissions"]
    assert permissions.split() == acl["rules"].split()


def ray_params() -> dict[str, Any]:
    params: dict[str, Any] = spilling_config()["params"]
    return params


# --- the objects of Kubernetes ---

OBJECTS = ("networkpolicy.yaml", "secrets.yaml", "overflow-volume.yaml", "gc-cronjob.yaml")


@pytest.mark.parametrize("version", KUBERNETES)
def test_objects_fit_the_schemas_of_kubernetes(version: str) -> None:
    (cluster,) = documents("raycluster.yaml")
    objects = [each for name in (*OBJECTS, "priorityclass.yaml") for each in documents(name)]
    for document in [*objects, *templates_of(cluster["spec"])]:
        kubernetes_validate.validate(document, version, strict=True)


def test_everything_is_in_the_namespace_of_the_decision() -> None:
    for name in (*OBJECTS, "raycluster.yaml", "podmonitor.yaml", "prometheus-rules.yaml"):
        assert {each["metadata"]["namespace"] for each in documents(name)} == {"ai-ml"}


def test_the_template_of_secrets_has_none_and_is_refused_as_it_is() -> None:
    for secret in documents("secrets.yaml"):
        for text in secret["data"].values():
            with pytest.raises(ValueError, match=r"base64|padding"):
                base64.b64decode(text, validate=True)


def test_there_is_a_password_for_each_user() -> None:
    users = values_of(SMALL)["auth"]["aclUsers"]
    needed = {entry.get("passwordKey", user) for user, entry in users.items()}
    assert set(documents("secrets.yaml")[0]["data"]) == needed
    (loop,) = re.findall(r"for user in ([a-z ]+); do", (DEPLOY / "README.md").read_text())
    assert set(loop.split()) == needed


def test_only_the_ports_of_the_server_and_its_exporter_are_open() -> None:
    (policy,) = documents("networkpolicy.yaml")
    values = values_of(SMALL)
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in policy["spec"]
    clients, prometheus = policy["spec"]["ingress"]
    assert clients["ports"] == [{"port": 6379, "protocol": "TCP"}]
    assert prometheus["ports"] == [{"port": 9121, "protocol": "TCP"}]
    assert values["service"]["type"] == "ClusterIP"
    # An empty selector is everybody.
    for source in clients["from"] + prometheus["from"]:
        assert source["podSelector"]["matchLabels"]


def test_the_spilling_config_is_one_and_of_the_head_alone() -> None:
    assert spilling_config()["type"] == "valkey"
    Config.load(ray_params(), {})
    for pod in pods()[1:]:
        names = [variable["name"] for variable in pod["containers"][0]["env"]]
        assert "RAY_object_spilling_config" not in names


def test_every_node_has_the_settings_of_ray_that_spilling_needs() -> None:
    needed = {f"RAY_{name}": str(value) for name, value in RAY_SETTINGS.items()}
    for pod in pods():
        given = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        assert needed.items() <= given.items()


def test_every_pod_has_the_secrets_where_the_config_looks_for_them() -> None:
    keys = {secret["metadata"]["name"]: set(secret["data"]) for secret in documents("secrets.yaml")}
    for pod in pods():
        found = set()
        for source in mounts_of(pod)["/etc/ray-spill"]["projected"]["sources"]:
            for item in source["secret"]["items"]:
                assert item["key"] in keys[source["secret"]["name"]]
                found.add(f"/etc/ray-spill/{item['path']}")
        assert found == {ray_params()[name] for name in ("password_file", "encryption_key_file")}


def test_the_secrets_are_readable_for_rays_user_alone() -> None:
    for pod in pods():
        assert mounts_of(pod)["/etc/ray-spill"]["projected"]["defaultMode"] == 0o400
        # Without a group the files are root's, and Ray cannot read them.
        ids = [pod["securityContext"][name] for name in ("runAsUser", "runAsGroup", "fsGroup")]
        assert ids == [1000, 100, 1000]


def test_pods_fulfil_the_restricted_profile() -> None:
    """That of the Pod Security Standards; of Valkey's pod, what the chart does not set itself."""
    exporter = values_of(SMALL)["metrics"]["exporter"]["securityContext"]
    assert exporter["runAsNonRoot"] is True
    contexts = [exporter]
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"projected", "persistentVolumeClaim"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        contexts += [container["securityContext"] for container in pod["containers"]]
    for context in contexts:
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_every_pod_has_the_overflow_where_the_config_looks_for_it() -> None:
    (claim,) = documents("overflow-volume.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods():
        volume = mounts_of(pod)[ray_params()["overflow_uri"]]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_the_overflow_holds_more_than_all_object_stores() -> None:
    head, workers = groups()
    stores = int(head["rayStartParams"]["object-store-memory"])
    stores += workers["maxReplicas"] * int(workers["rayStartParams"]["object-store-memory"])
    (claim,) = documents("overflow-volume.yaml")
    assert size_of(claim["spec"]["resources"]["requests"]["storage"]) > 3 * stores


def test_ray_has_the_cores_that_its_pods_request() -> None:
    head, workers = groups()
    assert head["rayStartParams"]["num-cpus"] == "0"
    requests = workers["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert workers["rayStartParams"]["num-cpus"] == requests["cpu"]


def test_pods_have_a_minute_to_end() -> None:
    assert [pod["terminationGracePeriodSeconds"] for pod in pods()] == [60, 60]
    patches = re.findall(
        r"patch deployment valkey.*?terminationGracePeriodSeconds\": (\d+)",
        "".join((DEPLOY / name).read_text() for name in ("README.md", "valkey-values-scaled.yaml")),
        re.DOTALL,
    )
    assert patches == ["60", "300"]


def test_valkeys_pod_has_cores_and_a_priority() -> None:
    values = values_of(SMALL)
    exporter = values["metrics"]["exporter"]
    for container in (values["resources"], values["initResources"], exporter["resources"]):
        assert container["requests"]["cpu"]
        assert "cpu" not in container["limits"]
    (priority,) = documents("priorityclass.yaml")
    assert values["priorityClassName"] == priority["metadata"]["name"]
    assert priority["value"] > 0


def test_one_label_names_the_server_for_policy_and_metrics() -> None:
    values = values_of(SMALL)
    label = values["podLabels"]
    assert list(label) == values["metrics"]["serviceMonitor"]["podTargetLabels"]
    assert [group["template"]["metadata"]["labels"] for group in groups()] == [label, label]
    (policy,) = documents("networkpolicy.yaml")
    selector = policy["spec"]["podSelector"]["matchLabels"]
    # Without the release's name, which anybody may choose.
    assert selector == {"app.kubernetes.io/name": "valkey", **label}


def test_prometheus_of_the_operators_chart_selects_all_that_is_for_it() -> None:
    expected = {"release": "kube-prometheus-stack"}
    assert values_of(SMALL)["metrics"]["serviceMonitor"]["extraLabels"] == expected
    for name in ("podmonitor.yaml", "prometheus-rules.yaml"):
        assert documents(name)[0]["metadata"]["labels"] == expected


def test_an_object_store_leaves_room_for_what_runs_beside_it() -> None:
    for group in groups():
        memory = group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
        assert int(group["rayStartParams"]["object-store-memory"]) <= size_of(memory) // 3


# --- TLS, as the page says ---


def with_tls(name: str) -> str:
    """A manifest with what is marked with (tls) put in place of what it is there for."""
    text = (DEPLOY / name).read_text()
    text = re.sub(r"valkey(://.*)  # \(tls\) valkeys://…$", r"valkeys\1", text, flags=re.MULTILINE)
    for mark, comment in re.findall(r"( *# \(tls\) .*:\n)((?: *# .*\n)+)", text):
        lines = re.sub(r"^( *)# ", r"\1", comment, flags=re.MULTILINE)
        if lines.lstrip().startswith('"url"'):
            text = text.replace(mark + comment, "")
            text = re.sub(r'^ *"url": "valkey://.*\n', lines, text, flags=re.MULTILINE)
        else:
            text = text.replace(mark + comment, lines)
    return text


def test_what_is_marked_is_all_that_tls_needs() -> None:
    values = documents("valkey-values-tls.yaml")[0]
    (cluster,) = yaml.safe_load_all(with_tls("raycluster.yaml"))
    (job,) = yaml.safe_load_all(with_tls("gc-cronjob.yaml"))
    gc = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    head, worker = pods_of(cluster["spec"])
    environment = {each["name"]: each["value"] for each in gc["containers"][0]["env"]}
    in_ray = json.loads(head["containers"][0]["env"][0]["value"])["params"]
    assert in_ray == {**ray_params(), **{name: in_ray[name] for name in ("url", "tls_ca_file")}}
    for config in (Config.load(in_ray, {}), Config.load({}, environment)):
        assert config.url == ray_params()["url"].replace("valkey://", "valkeys://")
        assert config.tls_ca_file == "/etc/ray-spill/ca.crt"
        for pod in (head, worker, gc):
            assert str(config.tls_ca_file) in files_of(pod)
    # The server's key is in the same Secret, and stays with the server.
    for pod in (head, worker, gc):
        (source,) = (s for s in sources_of(pod) if s["name"] == values["tls"]["existingSecret"])
        assert source["items"] == [{"key": "ca.crt", "path": "ca.crt"}]


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_manifests_with_tls_fit_the_schemas_of_kubernetes(version: str) -> None:
    (cluster,) = yaml.safe_load_all(with_tls("raycluster.yaml"))
    (job,) = yaml.safe_load_all(with_tls("gc-cronjob.yaml"))
    kubernetes_validate.validate(job, version, strict=True)
    for template in templates_of(cluster["spec"]):
        kubernetes_validate.validate(template, version, strict=True)


def test_all_places_that_have_the_secret_of_tls_agree() -> None:
    texts = [(DEPLOY / name).read_text() for name in ("valkey-values-tls.yaml", "README.md")]
    created = r"secret generic (\S+) \\\n#? +--from-file=(\S+) --from-file=(\S+) --from-file=(\S+)"
    found = [re.findall(created, text) for text in texts]
    name = documents("valkey-values-tls.yaml")[0]["tls"]["existingSecret"]
    assert found == [[(name, "server.crt", "server.key", "ca.crt")]] * 2


def sources_of(pod: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The Secrets that the projected volumes of a pod have."""
    projected = [each["projected"] for each in pod.get("volumes", ()) if "projected" in each]
    return [source["secret"] for each in projected for source in each["sources"]]


def files_of(pod: Mapping[str, Any]) -> list[str]:
    """The files that Ray's container finds in projected volumes."""
    return [
        f"{directory}/{item['path']}"
        for directory, volume in mounts_of(pod).items()
        for source in volume.get("projected", {"sources": []})["sources"]
        for item in source["secret"]["items"]
    ]


# --- the form that `config` prints ---


def form(**params: object) -> Any:
    """The part of a RayCluster's spec that `config` prints."""
    return yaml.safe_load(printed(**params)["forms"]["KubeRay"])


def printed(**params: object) -> dict[str, Any]:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in params.items()]
    result = CliRunner().invoke(cli, ["config", "--json", *given])
    assert result.exit_code == 0, result.output
    output: dict[str, Any] = json.loads(result.output)
    return output


Where = tuple[str | int, ...]


def marked(text: str) -> list[Where]:
    """Where a manifest has "(spill)": on the line of an entry, or in the comment above it."""
    lines = text.splitlines()

    def is_marked(line: int) -> bool:
        above = line - 1
        while lines[above].lstrip().startswith("#"):
            above -= 1
        return any("(spill)" in each for each in lines[above + 1 : line + 1])

    def walk(node: yaml.Node, path: Where) -> Iterator[Where]:
        if isinstance(node, yaml.MappingNode):
            entries = [(key.start_mark.line, key.value, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            entries = [(each.start_mark.line, at, each) for at, each in enumerate(node.value)]
        else:
            return
        for line, name, value in entries:
            if is_marked(line):
                yield (*path, name)
            else:
                yield from walk(value, (*path, name))

    root = {key.value: value for key, value in yaml.compose(text).value}
    return list(walk(root["spec"], ()))


def at(tree: Any, path: Where) -> Any:
    """What is there, with the spilling config as what it says."""
    for step in path:
        tree = tree[step]
    if isinstance(tree, dict) and tree.get("name") == "RAY_object_spilling_config":
        return {**tree, "value": json.loads(tree["value"])}
    return tree


def leaves(tree: Any, path: Where = ()) -> Iterator[Where]:
    if isinstance(tree, dict | list):
        for step, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*path, step))
    else:
        yield path


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_the_kuberay_form_is_what_deploy_marks(tls: bool) -> None:
    """But for the image, which a cluster chooses for itself."""
    text = with_tls("raycluster.yaml") if tls else (DEPLOY / "raycluster.yaml").read_text()
    spec = yaml.safe_load(text)["spec"]
    params = at(spec, ("headGroupSpec", "template", "spec", "containers", 0, "env", 0))
    ours = form(**params["value"]["params"])
    paths = [path for path in marked(text) if path[-1] != "image"]
    assert {path[0] for path in paths} == {"headGroupSpec", "workerGroupSpecs"}
    assert {"labels", "terminationGracePeriodSeconds", "securityContext", "volumes"} <= {
        path[-1] for path in paths
    }
    for path in paths:
        assert at(ours, path) == at(spec, path), path
    # Nor has it anything that deploy/ has not.
    for path in leaves(ours):
        if path[-2:] != (0, "value"):  # compared above
            assert at(ours, path) == at(spec, path), path


FILES = [each.name for each in parameters() if each.name.endswith("_file")]


@pytest.mark.parametrize(
    ("ca", "others"),
    [
        ("/etc/tls/ca.crt", "/etc/tls/{}"),
        ("/etc/tls/ca.crt", "/etc/{}/file"),
        ("/etc/tls/ca.crt", "/etc/tls/{}/file"),
    ],
    ids=["one directory", "directories", "nested"],
)
def test_the_kuberay_form_mounts_every_file_that_the_config_names(ca: str, others: str) -> None:
    named = {**{name: others.format(name) for name in FILES}, "tls_ca_file": ca}
    assert len(named) >= 5
    for pod in pods_of(form(url="valkeys://h", **named)):
        assert sorted(files_of(pod)) == sorted(named.values())
        directories = [PurePosixPath(each) for each in mounts_of(pod)]
        for each in directories:
            # In a volume that is read-only nothing can be mounted.
            assert not set(each.parents) & set(directories)


def test_the_kuberay_form_has_of_tls_the_keys_of_a_client_alone() -> None:
    files = {name: f"/etc/tls/{name}" for name in FILES if name.startswith("tls_")}
    for pod in pods_of(form(url="valkeys://h", **files)):
        found = {i["path"]: (s["name"], i["key"]) for s in sources_of(pod) for i in s["items"]}
        assert found == {
            "tls_ca_file": ("valkey-tls", "ca.crt"),
            "tls_cert_file": ("ray-spill-tls", "tls.crt"),
            "tls_key_file": ("ray-spill-tls", "tls.key"),
        }


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/ssl/certs/ca-certificates.crt", "/etc/ca.crt", "/ca.crt", "/home/ray/ca.crt"),
        *("/home/ray/anaconda3/ca/ca.crt", "/run/secrets/ca.crt", "/tmp/ray/tls/ca.crt"),
        "/opt/ca.crt",
    ],
)
def test_the_kuberay_form_hides_no_directory_of_the_image(path: str) -> None:
    params = {"url": "valkeys://h", "tls_ca_file": path}
    for pod in pods_of(form(**params)):
        assert "volumes" not in pod
        assert "volumeMounts" not in pod["containers"][0]
    (note,) = (each for each in printed(**params)["notes"] if "no volume" in each)
    assert f"for {path}:" in note


def test_the_kuberay_form_has_one_file_for_a_certificate_and_its_key() -> None:
    both = dict.fromkeys(("tls_cert_file", "tls_key_file"), "/etc/tls/client.pem")
    for pod in pods_of(form(url="valkeys://h", **both)):
        (source,) = sources_of(pod)
        assert source["name"] == "ray-spill-tls"
        assert source["items"] == [{"key": "tls.pem", "path": "client.pem"}]


@pytest.mark.parametrize(
    ("url", "label"),
    [
        ("valkey://valkey.ai-ml.svc.cluster.local:6379/0", "valkey.ai-ml"),
        ("valkey://valkey.ai-ml.svc", "valkey.ai-ml"),
        ("valkeys://cache.example.com,other.example.com", "cache.example.com"),
        ("valkey://10.0.0.1:7000", "10.0.0.1"),
        ("valkey://[fe80::1]:7000", "fe80--1"),
        (f"valkey://{'a' * 60}.b.c.d", f"{'a' * 60}.b"),
        ("unix:///run/valkey.sock", "valkey.ai-ml"),
        (None, "valkey.ai-ml"),
    ],
)
def test_the_label_of_the_kuberay_form_names_the_server(url: str | None, label: str) -> None:
    spec = form(**({} if url is None else {"url": url}))
    for template in templates_of(spec):
        assert template["template"]["metadata"]["labels"] == {"valkey-server": label}
        kubernetes_validate.validate(template, KUBERNETES[-1], strict=True)


# --- the clean-up of ended clusters ---


def gc_pod() -> Any:
    (job,) = documents("gc-cronjob.yaml")
    return job["spec"]["jobTemplate"]["spec"]["template"]


def gc_permissions() -> str:
    """Those of the user that the page has the operator add."""
    lines = r"^    auth:\n      aclUsers:\n        ray-gc:\n(?:     .*\n)+"
    (text,) = re.findall(lines, (DEPLOY / "README.md").read_text(), re.MULTILINE)
    (entry,) = yaml.safe_load(text)["auth"]["aclUsers"].values()
    permissions: str = entry["permissions"]
    return permissions


def test_the_clean_up_needs_no_permission_in_kubernetes_and_reaches_the_server() -> None:
    template = gc_pod()
    (container,) = template["spec"]["containers"]
    assert template["spec"]["automountServiceAccountToken"] is False
    assert container["image"] == pods()[0]["containers"][0]["image"]
    (policy,) = documents("networkpolicy.yaml")
    selectors = [
        each["podSelector"]["matchLabels"] for each in policy["spec"]["ingress"][0]["from"]
    ]
    assert template["metadata"]["labels"] in selectors
    environment = {each["name"]: each["value"] for each in container["env"]}
    config = Config.load({}, environment)
    assert config.url == ray_params()["url"]
    assert config.overflow_uri == ray_params()["overflow_uri"]
    secrets_, overflow = template["spec"]["volumes"]
    assert overflow in pods()[0]["volumes"]
    (source,) = secrets_["projected"]["sources"]
    assert source["secret"]["name"] == documents("secrets.yaml")[0]["metadata"]["name"]
    (item,) = source["secret"]["items"]
    assert item["key"] == config.username
    mount, mount_of_overflow = container["volumeMounts"]
    assert f"{mount['mountPath']}/{item['path']}" == config.password_file
    assert mount_of_overflow["mountPath"] == config.overflow_uri
    assert mount_of_overflow["name"] == overflow["name"]


def test_the_clean_up_fulfils_the_restricted_profile() -> None:
    spec = gc_pod()["spec"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["containers"][0]["securityContext"] == pods()[0]["containers"][0]["securityContext"]


def test_the_user_of_the_clean_up_removes_and_can_neither_read_nor_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acl = tmp_path / "users.acl"
    acl.write_text(f"user default on nopass ~* +@all\nuser ray-gc on >secret {gc_permissions()}\n")
    monkeypatch.setattr(cleanup, "time", Clock())
    with valkey_server(aclfile=acl) as server:
        config = Config.load({"url": server.url}, {})
        with contextlib.closing(Store(config, "session_1", "ab" * 28)) as store:
            store.begin_lease("127.0.0.1:1", lambda: False)
            (url, _), failure = store.put(
                [samples.source(bytes(1000)), samples.source(os.urandom(3_000_000))]
            )
            assert failure is None
        with valkey.Valkey(port=server.port, username="ray-gc", password="secret") as client:
            key = url.partition("?")[0]
            assert server.client.exists(key)
            for command in (f"GET {key}", f"SET {key} x", "KEYS *", "UNLINK vllm:kv:x"):
                with pytest.raises(valkey.exceptions.NoPermissionError):
                    client.execute_command(*command.split())
        monkeypatch.setenv("RAY_VALKEY_SPILL_PASSWORD", "secret")
        _, *arguments = gc_pod()["spec"]["containers"][0]["command"]
        given = [f"--url={server.url}", "--username=ray-gc"]
        result = CliRunner().invoke(cli, [*arguments, *given])
        assert result.exit_code == 0, result.output
        assert "2 objects" in result.output
        assert server.our_keys() == []


# --- the image, and the page ---


def test_the_image_has_the_clusters_ray_and_a_python_that_will_do() -> None:
    (cluster,) = documents("raycluster.yaml")
    version = cluster["spec"]["rayVersion"]
    text = (DEPLOY / "Dockerfile").read_text()
    tag = re.search(rf"^ARG RAY_TAG={re.escape(version)}-py3(\d+)$", text, re.MULTILINE)
    assert tag is not None
    project = (ROOT / "pyproject.toml").read_text()
    oldest = re.search(r'^requires-python = ">=3\.(\d+)"$', project, re.MULTILINE)
    assert oldest is not None
    assert int(tag[1]) >= int(oldest[1])
    for pod in pods():
        image = pod["containers"][0]["image"]
        assert f"--tag {image} " in text
        assert image.endswith(f":{version}")


def test_the_image_keeps_what_it_has_and_is_checked_in_the_end() -> None:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    (run,) = re.findall(r"^RUN .*$", text, re.MULTILINE)
    steps = [" ".join(step.split()) for step in run.split("&&")]
    listing, install = steps[:2]
    listed = listing.rpartition(" > ")[2]
    assert "pip list --format=freeze" in listing
    assert f"pip install --no-cache-dir --constraint {listed} " in install
    checks = steps[steps.index("pip check") :]
    # What an older image's pyOpenSSL does not outlive is a newer cryptography.
    assert any({"OpenSSL.SSL,", "cryptography,", "ray'"} <= {*check.split()} for check in checks)


# What the locks of rayproject/ray have of our dependencies (python/deplocks/base_extra and
# python/requirements_compiled.txt in Ray's repository, Ray 2.60). valkey and xxhash are not there.
OF_RAYS_IMAGE = {
    "click": ["8.1.7"],
    "cryptography": ["43.0.3", "44.0.3"],
    "lz4": ["4.4.5"],
    "numpy": ["1.26.4"],
    "pyarrow": ["19.0.1"],
    "ray": ["2.60.0"],
}


def test_the_package_replaces_nothing_in_the_image() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^dependencies = \[$(.*?)^\]$", text, re.MULTILINE | re.DOTALL)
    needed = {each.name: each for each in map(Requirement, re.findall('"(.*)"', listed))}
    assert needed.keys() - OF_RAYS_IMAGE.keys() == {"valkey", "xxhash"}
    for name, versions in OF_RAYS_IMAGE.items():
        assert all(needed[name].specifier.contains(version) for version in versions), name


def test_the_image_recipe_has_no_findings() -> None:
    linter = Path(sysconfig.get_path("scripts")) / "hadolint"
    subprocess.run([linter, DEPLOY / "Dockerfile"], check=True)


def test_the_check_of_the_page_passes(tmp_path: Path) -> None:
    text = (DEPLOY / "README.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"ray-valkey-spill (check .*)", text)
    arguments = shlex.split(line)
    options = dict(zip(arguments[1::2], arguments[2::2]))
    asked = {name.removeprefix("--").replace("-", "_"): text for name, text in options.items()}
    assert asked == {name: str(value) for name, value in ray_params().items()}
    with deployed(tmp_path, SMALL) as server:
        given = [f"--{name.replace('_', '-')}={value}" for name, value in server.params.items()]
        found = CliRunner().invoke(cli, ["check", "--json", *given])
    assert found.exit_code == 0, found.output


def test_files_that_the_page_names_are_there() -> None:
    names = set(re.findall(r"`([\w.-]+\.yaml|Dockerfile)`", (DEPLOY / "README.md").read_text()))
    assert {"valkey-values.yaml", "Dockerfile"} <= names <= {path.name for path in DEPLOY.iterdir()}
