"""The configuration for Ray, as text for each place that takes it, and the server's ACL."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from textwrap import indent
from typing import Any

from ray_valkey_spill.cli.options import Given
from ray_valkey_spill.cli.ray_setting import CONFIG_VARIABLE
from ray_valkey_spill.config import ENV_PREFIX, Address, Config, check_params, parameters
from ray_valkey_spill.errors import ConfigError
from ray_valkey_spill.format.sealing import is_key, key_in_place_of_its_file
from ray_valkey_spill.plugin.spilling_config import RAY_SETTINGS, spilling_config, system_config
from ray_valkey_spill.tiers.preflight import acl_rules

__all__ = ["Forms", "acl", "of"]

_USER = "ray"  # of an ACL, if the config names none

# Ray 2.60 wants the token in ~/.ray/auth_token of `ray start --head`, but not of `--address`.
_AUTH = 'export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}"'

# The names of deploy/: of the Secret with passwords, the claim of an overflow, and the server.
_PASSWORDS = "valkey-users"
_OVERFLOW_CLAIM = "ray-spill-overflow"
_SERVER = "valkey.ai-ml"

# The parameters that name a file, each with the Secret that has it, and the key there.
_FILES = {
    "password_file": (_PASSWORDS, None),  # the user
    "encryption_key_file": ("ray-spill-keys", "keys"),
    "tls_ca_file": ("valkey-tls", "ca.crt"),  # the server's, which has the server's key too
    "tls_cert_file": ("ray-spill-tls", "tls.crt"),  # of the type kubernetes.io/tls
    "tls_key_file": ("ray-spill-tls", "tls.key"),
}

# A volume at one of the first directories, or above, and one within the others, would hide files of
# the image, of Ray or of Kubernetes.
_USED = [
    PurePosixPath(f"/{name}")
    for name in (
        *("bin", "boot", "dev", "etc/ssl/certs", "home/ray", "lib", "lib64", "opt", "proc", "root"),
        *("run/secrets", "sbin", "srv", "sys", "tmp/ray", "usr", "var/run/secrets"),
    )
]
_CLOSED = [
    PurePosixPath(f"/{name}")
    for name in ("home/ray", "run/secrets", "tmp/ray", "usr", "var/run/secrets")
]


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
    if is_key(given.params.get("encryption_key_file") or ""):
        raise key_in_place_of_its_file()
    params = {name: value for name, value in given.params.items() if value is not None}
    spilling = spilling_config(**params)
    arguments = ", ".join(f"{name}={value!r}" for name, value in params.items())
    head = f"--system-config={shlex.quote(json.dumps(system_config(**params)))}"
    texts = {
        "ray start": f"{_AUTH}  # on every node\nray start --head {head}",
        "environment": _environment(spilling),
        "KubeRay": _kuberay(spilling, params, address),
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
    if left_out := sorted(
        variable
        for each in parameters()
        if each.name not in params
        and os.environ.get(variable := f"{ENV_PREFIX}{each.name.upper()}")
    ):
        yield (
            f"Set here, and not part of this: {', '.join(left_out)}. Set the same on every node, "
            "or give options instead."
        )
    if username:
        where = params.get("password_file") or "RAY_VALKEY_SPILL_PASSWORD in the environment"
        yield f"The password: {where}, on every node."
    for path in _files(params):
        if not _can_be_mounted(path):
            reason = (
                "it would hide other files"
                if PurePosixPath(path).is_absolute()
                else "it is not absolute"
            )
            yield (
                f"The KubeRay form has no volume for {path}: {reason}. Use a directory of its own, "
                "such as /etc/ray-spill, unless the image has this file."
            )
    yield "RAY_AUTH_MODE: the same for nodes and drivers: disabled, or token with RAY_AUTH_TOKEN."
    yield (
        'Ray will warn of an "unstable API". Ignore it: the "stable API" that it suggests spills '
        "to a directory instead."
    )


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
    if re.search(r"\s", user):
        raise ConfigError(f"no ACL user can have the name {user!r}", "Give one without spaces")
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


def _kuberay(spilling: str, params: Mapping[str, Any], address: Address) -> str:
    user = address.username or _USER
    env = [f'name: RAY_{name}\nvalue: "{value}"' for name, value in RAY_SETTINGS.items()]
    if "password_file" not in params:
        env.append(
            "name: RAY_VALKEY_SPILL_PASSWORD\nvalueFrom: {secretKeyRef: "
            f"{{name: {_PASSWORDS}, key: {_scalar(user)}, optional: true}}}}"
        )
    files = {
        path: (secret, key or user)
        for path, (secret, key) in _files(params).items()
        if _can_be_mounted(path)
    }
    volumes = [*_secret_volumes(files), *_overflow_volumes(params.get("overflow_uri"))]
    server = _server_label(address) if "url" in params else _SERVER
    of_head = [f"name: {CONFIG_VARIABLE}\nvalue: {json.dumps(spilling)}", *env]
    return (
        "# In the RayCluster's spec; the image of every group needs ray-valkey-spill installed.\n"
        "headGroupSpec:\n  template:\n"
        + indent(_template("ray-head", server, of_head, volumes), 4 * " ")
        + "workerGroupSpecs:\n  - groupName: workers\n    template:\n"
        + indent(_template("ray-worker", server, env, volumes), 6 * " ")
    )


def _server_label(address: Address) -> str:
    """Return a label's value for the server, such as `valkey.ai-ml` for a Service and namespace."""
    name = re.sub(r"\.svc(\..*)?$", "", address.endpoints[0].host)
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:63].strip("-._") or _SERVER


def _files(params: Mapping[str, Any]) -> dict[str, tuple[str, str | None]]:
    """Return each file that `params` name, with its Secret and key."""
    files = {params[name]: source for name, source in _FILES.items() if name in params}
    certificate = params.get("tls_cert_file")
    if certificate is not None and certificate == params.get("tls_key_file"):
        files[certificate] = "ray-spill-tls", "tls.pem"
    return files


def _can_be_mounted(path: str) -> bool:
    """Return whether a volume in the directory of `path` hides nothing that may be there."""
    directory = PurePosixPath(path).parent
    hides = any(each.is_relative_to(directory) for each in _USED)
    is_within = any(directory.is_relative_to(each) for each in _CLOSED)
    return directory.is_absolute() and not hides and not is_within


def _secret_volumes(files: Mapping[str, tuple[str, str]]) -> Iterator[_Volume]:
    """Yield a volume for each directory of `files`: by the path of a file, Secret and key."""
    directories = {PurePosixPath(path).parent for path in files}
    by_directory: dict[PurePosixPath, str] = {}
    for path, (secret, key) in files.items():
        where = PurePosixPath(path)
        # The topmost: nothing can be mounted within a volume that is read-only.
        directory = min(
            (each for each in directories if where.is_relative_to(each)),
            key=lambda each: len(each.parts),
        )
        item = f"{{key: {_scalar(key)}, path: {_scalar(str(where.relative_to(directory)))}}}"
        source = f"secret:\n  name: {secret}\n  items: [{item}]"
        by_directory[directory] = by_directory.get(directory, "") + _item(source)
    for number, (directory, sources) in enumerate(by_directory.items(), 1):
        name = "spill-secrets" if number == 1 else f"spill-secrets-{number}"
        # A directory: a file that is mounted by subPath never changes.
        yield _Volume(
            f"name: {name}\nmountPath: {_scalar(str(directory))}\nreadOnly: true",
            f"name: {name}\nprojected:\n  defaultMode: 0400\n  sources:\n"
            + indent(sources, 4 * " "),
        )


def _overflow_volumes(uri: str | None) -> Iterator[_Volume]:
    """Yield the volume of an overflow that is a directory."""
    if uri is not None and uri.startswith("/"):
        yield _Volume(
            f"name: spill-overflow\nmountPath: {_scalar(uri)}",
            "name: spill-overflow\n"
            f"persistentVolumeClaim: {{claimName: {_OVERFLOW_CLAIM}}}  # ReadWriteMany",
        )


# With the containers', the restricted profile of the Pod Security Standards.
_POD_SECURITY = """\
securityContext:
  runAsNonRoot: true
  runAsUser: 1000  # the image's user `ray`
  runAsGroup: 100
  fsGroup: 1000  # lets that user read the files of Secrets, which belong to root
  seccompProfile: {type: RuntimeDefault}
"""
_CONTAINER_SECURITY = (
    "securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}"
)


def _template(container: str, server: str, env: list[str], volumes: list[_Volume]) -> str:
    """Return the part of a pod's template that spilling needs, as YAML.

    Args:
        container: its name.
        server: the value of the label that Valkey's pod has too.
        env: variables, each as the lines of a mapping.
        volumes: those that the container mounts.
    """
    lines = [f"name: {container}", *_list("env", env)]
    lines += _list("volumeMounts", [volume.mount for volume in volumes])
    spec = [
        "terminationGracePeriodSeconds: 60  # to remove what the session has spilled",
        *_POD_SECURITY.splitlines(),
        *_list("containers", ["\n".join([*lines, _CONTAINER_SECURITY])]),
        *_list("volumes", [volume.source for volume in volumes]),
    ]
    return (
        "metadata:\n  labels:\n"
        # Metrics of Ray and of the server's exporter are joined by it.
        f"    valkey-server: {json.dumps(server)}  # the same as on Valkey's pod\n"
        "spec:\n" + "".join(f"  {line}\n" for line in spec)
    )


# Words that YAML, in one version or another, takes for something else.
_NO_STRINGS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


def _scalar(text: str) -> str:
    """Return text as YAML takes it: quoted, unless it is plain."""
    is_plain = re.fullmatch("[A-Za-z/][A-Za-z0-9_./-]*", text) and text.lower() not in _NO_STRINGS
    return text if is_plain else json.dumps(text)


def _list(key: str, mappings: list[str]) -> list[str]:
    """Return the lines of a key with a YAML list, or none if the list is empty."""
    items = "".join(_item(each) for each in mappings)
    return [f"{key}:", *indent(items, "  ").splitlines()] if items else []


def _item(mapping: str) -> str:
    """Return an item of a YAML list."""
    first, *others = mapping.splitlines()
    return "".join(f"{line}\n" for line in [f"- {first}", *(f"  {line}" for line in others)])
