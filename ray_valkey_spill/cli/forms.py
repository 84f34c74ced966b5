"""The configuration for Ray, as text for each place that takes it, and the server's ACL."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from textwrap import indent
from typing import Any

from ray_valkey_spill.cli.options import Given
from ray_valkey_spill.cli.ray_setting import CONFIG_VARIABLE
from ray_valkey_spill.config import Config, check_params, parameters
from ray_valkey_spill.plugin.spilling_config import RAY_SETTINGS, spilling_config, system_config
from ray_valkey_spill.tiers.preflight import acl_rules

__all__ = ["Forms", "acl", "of"]

_USER = "ray"  # of an ACL, if the config names none

# Ray 2.60 wants the token in ~/.ray/auth_token of `ray start --head`, but not of `--address`.
_AUTH = 'export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}"'

# The names of deploy/: of Secrets, of the keys in them, and of the claim of an overflow.
_PASSWORD_SECRET, _KEYS_SECRET, _KEYS_ITEM = "valkey-users", "ray-spill-keys", "keys"
_OVERFLOW_CLAIM = "ray-spill-overflow"


@dataclass(frozen=True, slots=True)
class Forms:
    """The configuration as text, by the place that takes it, and notes on it."""

    spilling_config: str
    system_config: Mapping[str, Any]
    texts: Mapping[str, str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        return {
            "object_spilling_config": json.loads(self.spilling_config),
            "system_config": dict(self.system_config),
            "forms": dict(self.texts),
            "notes": self.notes,
        }


def of(given: Given) -> Forms:
    """Return the forms of `given` parameters.

    Raises:
        ConfigError: no environment can make them valid.
    """
    address = check_params(given.params, called=given.called)
    params = {name: value for name, value in given.params.items() if value is not None}
    spilling = spilling_config(**params)
    arguments = ", ".join(f"{name}={value!r}" for name, value in params.items())
    head = f"--system-config={shlex.quote(json.dumps(system_config(**params)))}"
    texts = {
        "ray start": f"{_AUTH}  # on every node\nray start --head {head}",
        "environment": _environment(spilling),
        "KubeRay": _kuberay(spilling, params, address.username),
        "Python": "import ray, ray_valkey_spill\n\n"
        f"ray.init(_system_config=ray_valkey_spill.system_config({arguments}))",
    }
    return Forms(
        spilling, system_config(**params), texts, [*_notes(given, params, address.username)]
    )


def _notes(given: Given, params: Mapping[str, Any], username: str | None) -> Iterator[str]:
    if any(name.endswith(CONFIG_VARIABLE) for name in given.called.values()):
        yield f"The parameters are those of {CONFIG_VARIABLE}."
    if "url" not in params:
        (default,) = (each.default for each in parameters() if each.name == "url")
        yield f"No --url: each node uses its RAY_VALKEY_SPILL_URL, or else {default}."
    if username:
        where = params.get("password_file") or "RAY_VALKEY_SPILL_PASSWORD in the environment"
        yield f"The password: {where}, on every node."
    yield "RAY_AUTH_MODE: the same for nodes and drivers: disabled, or token with RAY_AUTH_TOKEN."


def _environment(spilling: str) -> str:
    # The spilling config reaches worker nodes through the head; other settings do not (Ray 2.60).
    settings = [
        f"export RAY_{name}={value}  # on every node" for name, value in RAY_SETTINGS.items()
    ]
    return "\n".join(
        [
            f"export {CONFIG_VARIABLE}={shlex.quote(spilling)}",
            *settings,
            f"{_AUTH}  # on every node",
        ]
    )


def acl(config: Config) -> dict[str, str]:
    """Return the least that a user needs, as text for each place that takes it."""
    user = config.address.username or _USER
    rules = acl_rules(config)
    return {
        "user": user,
        "rules": rules,
        # `reset` takes back what an existing user was allowed before.
        "command": f"ACL SETUSER {user} reset on >PASSWORD {rules}",
        "aclfile": f"user {user} reset on #SHA256 {rules}",
    }


# --- KubeRay, with the names of deploy/raycluster.yaml ---


@dataclass(frozen=True, slots=True)
class _Volume:
    """A container's mount of a volume, and the volume: each as the lines of a mapping."""

    mount: str
    source: str


def _kuberay(spilling: str, params: Mapping[str, Any], username: str | None) -> str:
    user = username or _USER
    env = [f'name: RAY_{name}\nvalue: "{value}"' for name, value in RAY_SETTINGS.items()]
    secrets = {}
    if (password_file := params.get("password_file")) is not None:
        secrets[password_file] = (_PASSWORD_SECRET, user)
    else:
        env.append(
            "name: RAY_VALKEY_SPILL_PASSWORD\nvalueFrom: {secretKeyRef: "
            f"{{name: {_PASSWORD_SECRET}, key: {user}, optional: true}}}}"
        )
    if (key_file := params.get("encryption_key_file")) is not None:
        secrets[key_file] = (_KEYS_SECRET, _KEYS_ITEM)
    volumes = [*_secret_volumes(secrets), *_overflow_volumes(params.get("overflow_uri"))]
    of_head = [f"name: {CONFIG_VARIABLE}\nvalue: {json.dumps(spilling)}", *env]
    return (
        "# In the RayCluster's spec; the image of every group needs ray-valkey-spill installed.\n"
        "headGroupSpec:\n  template:\n    spec:\n"
        + indent(_pod("ray-head", of_head, volumes), 6 * " ")
        + "workerGroupSpecs:\n  - groupName: workers\n    template:\n      spec:\n"
        + indent(_pod("ray-worker", env, volumes), 8 * " ")
    )


def _secret_volumes(secrets: Mapping[str, tuple[str, str]]) -> Iterator[_Volume]:
    """Yield a volume for each directory of `secrets`: by the path of a file, Secret and key."""
    by_directory: dict[str, str] = {}
    for path, (secret, key) in secrets.items():
        where = PurePosixPath(path)
        source = f"secret:\n  name: {secret}\n  items: [{{key: {key}, path: {where.name}}}]"
        by_directory[str(where.parent)] = by_directory.get(str(where.parent), "") + _item(source)
    for number, (directory, sources) in enumerate(by_directory.items(), 1):
        name = "spill-secrets" if number == 1 else f"spill-secrets-{number}"
        # A directory: a file that is mounted by subPath never changes.
        yield _Volume(
            f"name: {name}\nmountPath: {directory}\nreadOnly: true",
            f"name: {name}\nprojected:\n  defaultMode: 0400\n  sources:\n"
            + indent(sources, 4 * " "),
        )


def _overflow_volumes(uri: str | None) -> Iterator[_Volume]:
    """Yield the volume of an overflow that is a directory."""
    if uri is not None and uri.startswith("/"):
        yield _Volume(
            f"name: spill-overflow\nmountPath: {uri}",
            "name: spill-overflow\n"
            f"persistentVolumeClaim: {{claimName: {_OVERFLOW_CLAIM}}}  # ReadWriteMany",
        )


def _pod(container: str, env: list[str], volumes: list[_Volume]) -> str:
    """Return the part of a pod's spec that spilling needs, as YAML.

    Args:
        container: its name.
        env: variables, each as the lines of a mapping.
        volumes: those that the container mounts.
    """
    variables = "".join(_item(each) for each in env)
    text = f"containers:\n  - name: {container}\n    env:\n{indent(variables, 6 * ' ')}"
    if not volumes:
        return text
    mounts = "".join(_item(volume.mount) for volume in volumes)
    sources = "".join(_item(volume.source) for volume in volumes)
    return (
        # Files of Secrets belong to root; `fsGroup` lets the image's user `ray` read them.
        "securityContext: {runAsUser: 1000, runAsGroup: 100, fsGroup: 1000}\n"
        f"{text}    volumeMounts:\n{indent(mounts, 6 * ' ')}volumes:\n{indent(sources, '  ')}"
    )


def _item(mapping: str) -> str:
    """Return an item of a YAML list."""
    first, *others = mapping.splitlines()
    return "".join(f"{line}\n" for line in [f"- {first}", *(f"  {line}" for line in others)])
